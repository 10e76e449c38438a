"""The README of a folder for plain transformers."""

from __future__ import annotations

from collections.abc import Sequence

import transformers
from omegaconf import DictConfig

import prism_deco
from prism_deco.export.card import composition, header
from prism_deco.llms import LanguageModel
from prism_deco.vlm import VLM

_SLOTS = {
    "after_bos": "The image stands right after the beginning-of-sequence token, before all text. In a prompt of your "
    "own, write `<image>` there.",
    "in_place": "The image stands at the start of the message that shows it. In a prompt of your own, write `<image>` "
    "and a newline there.",
}


def llava_card(config: DictConfig, vlm: VLM, llm: LanguageModel, difference: float, notes: Sequence[str]) -> str:
    """What the folder holds, how to prompt it, and what is not as in training, in Markdown with the hub's header.

    Args:
        difference: largest difference of the logits that was found when the folder was written.
    """
    differences = "".join(f"- {note}\n" for note in notes)
    return f"""\
{header("transformers")}{composition(config, vlm, llm)}
## Use

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
image = {{"type": "image", "image": Image.open("image.jpg").convert("RGB")}}
question = [image, {{"type": "text", "text": "What is in the image?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The chat template writes every special token and puts the image where it was in training. {_SLOTS[llm.spec.image_slot]}
The prompt already begins with its first special token: tokenise it with `add_special_tokens=False`. Several questions
at once need `padding=True`; the tokenizer pads on the left, as generation requires.

## How it differs from the trained model

- The logits for one image and a question differed by at most {difference:.1e} when this folder was written by
  prism_deco {prism_deco.__version__}.
- Of the vision tower only the blocks up to the one whose output is used are here (`vision_feature_layer: -1`).
- The image processor resizes with torchvision, training with PIL: pixels differ by one or two of 255 levels.
- Training opened images with PIL and `convert("RGB")`: orientation tags (EXIF) are ignored, and 16-bit and float values
  are clipped to 0..255. Given a path or URL, transformers {transformers.__version__} turns images by their EXIF tag,
  does not scale 16-bit values to 0..1 and cannot read float images. Open such images as above.
{differences}"""
