"""The README of an exported folder, in Markdown with the hub's header."""

from __future__ import annotations

from collections.abc import Sequence

import transformers
from omegaconf import DictConfig

import prism_deco
from prism_deco.llms import LanguageModel
from prism_deco.vlm import VLM

_FILES = """\
| file | what it is |
|---|---|
| `model*.safetensors` | projector and LLM |
| `backbone*.safetensors` | the vision tower |
| `backbone.json` | the tower's SHA-256, and how an image becomes its input |
| `llm.json` | the LLM's architecture, as transformers writes it |
| `tokenizer/` | the tokenizer with the chat template |
| `config.yaml` | the configuration of the training run |
| `SHA256SUMS` | checksums, compared when the folder is loaded |
"""
_SLOTS = {
    "after_bos": "The image stands right after the beginning-of-sequence token, before all text. In a prompt of your "
    "own, write `<image>` there.",
    "after_first_token": "The image stands behind the first token of the text. In a prompt of your own, write "
    "`<image>` there.",
    "in_place": "The image stands at the start of the message that shows it. In a prompt of your own, write `<image>` "
    "and a newline there.",
}


def card(config: DictConfig, vlm: VLM, llm: LanguageModel) -> str:
    """What a folder for `prism_deco.load` holds, how it was trained and how to use it."""
    plugins = ", ".join(config.plugins)
    needs = f"\nIt also needs the modules {plugins} on the Python path.\n" if plugins else ""
    return f"""\
{_header("prism_deco")}{_composition(config, vlm, llm)}
## Use

```python
import prism_deco

model = prism_deco.load("THIS_FOLDER")
model.generate(["image.jpg"], ["What is in the image?"], max_new_tokens=64)
```

Give raw questions: the chat template is applied. Nothing else is downloaded or read.
Written by prism_deco {prism_deco.__version__}.
{needs}
## Files

{_FILES}"""


def llava_card(config: DictConfig, vlm: VLM, llm: LanguageModel, difference: float, notes: Sequence[str]) -> str:
    """What a folder for plain transformers holds, how to prompt it, and how it differs from the trained model.

    Args:
        difference: largest difference of the logits that was found when the folder was written.
        notes: further differences, one sentence or more each.
    """
    differences = "".join(f"- {note}\n" for note in notes)
    return f"""\
{_header("transformers")}{_composition(config, vlm, llm)}
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
- The vision tower ends with the block whose output is used (`vision_feature_layer: -1`).
- The image processor resizes with torchvision, training with PIL: pixels differ by one or two of 255 levels.
- Training opened images with PIL and `convert("RGB")`: orientation tags (EXIF) are ignored, and 16-bit and float values
  are clipped to 0..255. Given a path or URL, transformers {transformers.__version__} turns images by their EXIF tag,
  does not scale 16-bit values to 0..1 and cannot read float images. Open such images as above.
{differences}"""


def _header(library: str) -> str:
    """The metadata that the hub reads."""
    return f"---\nlibrary_name: {library}\npipeline_tag: image-text-to-text\n---\n"


def _composition(config: DictConfig, vlm: VLM, llm: LanguageModel) -> str:
    """The parts of the model and its training."""
    recipe = config.recipe
    height, width = vlm.projector.out_grid
    parameters = sum(p.numel() for p in vlm.parameters())
    steps = f"{recipe.max_steps} steps" if recipe.max_steps else f"{recipe.epochs} epochs"
    return f"""\
# {config.run_id or "A vision-language model"}

| part | choice |
|---|---|
| vision backbone ({recipe.tower}) | `{config.backbone.name}`, {vlm.backbone.image_size} px, {config.backbone.resize} |
| projector | `{config.projector.name}`, {vlm.backbone.num_patches} patches to {height}x{width} visual tokens |
| LLM | `{config.llm.name}`, {llm.max_positions} positions |
| parameters | {parameters:,} |
| data | `{config.data.name}` |
| recipe | `{recipe.name}`: {steps} of {recipe.global_batch_size} records, learning rate {recipe.lr:g} |
| seed | {config.seed} |

The weights of the backbone and the LLM keep the licences they came with.
"""
