"""The README of an exported folder: Markdown with the hub's metadata header."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import transformers
from huggingface_hub import EvalResult, ModelCardData
from omegaconf import DictConfig, OmegaConf

import prism_deco
from prism_deco.backbones.transforms import TowerTransform
from prism_deco.config import load_choice
from prism_deco.config.choices import choice_path, choices
from prism_deco.files import read_json, read_result
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
    "after_bos": "The image comes right after the beginning-of-sequence token, before all text. In a prompt of your "
    "own, write `<image>` there.",
    "after_first_token": "The image comes right after the first token of the text. In a prompt of your own, write "
    "`<image>` there.",
    "in_place": "The image comes at the start of its message. In a prompt of your own, write `<image>` and a newline "
    "there.",
}
_PAD = """\
# As in training: padded to a square{almost}.
longest = max(image.size)
left, top = ((longest - side) // 2 for side in image.size)
canvas = Image.new("RGB", {canvas}, {fill})
canvas.paste(image, (left, top))
image = canvas
"""
_CANVAS = {
    "pad": {"almost": "", "canvas": "(longest, longest)"},
    "letterbox": {"almost": ", or one pixel less", "canvas": "(image.width + 2 * left, image.height + 2 * top)"},
}
"""Canvas sizes of the padding strategies in `backbones.transforms`."""


def card(config: DictConfig, vlm: VLM, llm: LanguageModel, run: Path | None) -> str:
    """The README of a folder for `prism_deco.load`: its content, training and use.

    Args:
        run: the run folder, for the data's hash and the scores.
    """
    plugins = _plain(", ".join(config.plugins))
    needs = f"\nIt also needs the modules {plugins} on the Python path.\n" if plugins else ""
    return f"""\
{_header("prism_deco", config, run)}{_composition(config, vlm, llm, run)}
## Use

```python
import prism_deco

model = prism_deco.load("THIS_FOLDER")
model.generate(["image.jpg"], ["What is in the image?"], max_new_tokens=64)
```

Pass raw questions: the chat template is applied. Nothing else is downloaded or read.
Written by prism_deco {prism_deco.__version__}.
{needs}
## Files

{_FILES}"""


def transformers_card(
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    difference: float,
    notes: Sequence[str],
    visual_token: str,
    run: Path | None,
) -> str:
    """The README of a folder for plain transformers: its content, prompts, and differences from the trained model.

    Args:
        difference: largest difference of the logits, measured during the export.
        notes: further differences, one or more sentences each.
        visual_token: `<image>`, or `<video>` if images are passed as videos of one frame.
        run: as for `card`.
    """
    differences = "".join(f"- {note}\n" for note in notes)
    slot = _SLOTS[llm.prompt_format.image_slot].replace("<image>", visual_token)
    if config.recipe.prompt == "plain":
        slot += " A prompt is the image alone, as in training (recipe.prompt=plain): the question is dropped."
    part = '"type": "image", "image": image'
    pad = about = ""
    if visual_token != "<image>":
        part = '"type": "video", "video": [image]'
        about = "The class compresses videos only: an image is a video of one frame.\n"
        transform: TowerTransform = next(iter(vlm.backbone.transform.towers.values()))
        if transform.resize in _CANVAS:
            pad = _PAD.format(fill=transform.fill, **_CANVAS[transform.resize])
    return f"""\
{_header("transformers", config, run)}{_composition(config, vlm, llm, run)}
## Use

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
image = Image.open("image.jpg").convert("RGB")
{pad}question = [{{{part}}}, {{"type": "text", "text": "What is in the image?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

{about}The chat template writes every special token and puts the image where it was in training. {slot}
The prompt already begins with its first special token: tokenise it with `add_special_tokens=False`. Batches of
questions need `padding=True`; the tokenizer pads on the left, as generation requires.

## How it differs from the trained model

- The logits for one image and a question differed by at most {difference:.1e} when this folder was written by
  prism_deco {prism_deco.__version__}.
- The vision tower ends with the block whose output is used (`vision_feature_layer: -1`).
- The image processor resizes with torchvision, training with PIL: pixels differ by one or two of 255 levels.
- Training opened images with PIL and `convert("RGB")`: orientation tags (EXIF) are ignored, and 16-bit and float values
  are clipped to 0..255. Given a path or URL, transformers {transformers.__version__} turns images by their EXIF tag,
  does not scale 16-bit values to 0..1 and cannot read float images. Open such images as above.
{differences}"""


def _header(library: str, config: DictConfig, run: Path | None) -> str:
    """The hub's metadata."""
    results = []
    for name, content in _scores(run).items():
        value = content["metrics"][content["primary"]]
        # The task; name and type of the data set, which are the benchmark's; then the metric and its value.
        results.append(EvalResult("image-text-to-text", name, name, content["primary"], value))
    parts = [part for group in ("backbone", "llm") for part in _parts(config, group)]
    bases = [str(part["hub"]) for part in parts if _is_of_hub(part)]
    data = ModelCardData(
        library_name=library,
        pipeline_tag="image-text-to-text",
        base_model=bases or None,
        # Scores require a name.
        model_name=(config.run_id or "A vision-language model") if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _parts(config: DictConfig, group: str) -> list[dict[str, Any]]:
    """The content of a choice; for an ensemble, of its towers, and for a mixture, of its sets."""
    content: Any = OmegaConf.to_container(config[group], resolve=True)
    if sets := content.get("mixture"):
        return [_set(name, part) for name, part in sets.items()]
    # A tower of an ensemble is the name of a choice or its content.
    towers = content.get("towers") or []
    return [load_choice(group, tower) if isinstance(tower, str) else tower for tower in towers] or [content]


def _set(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """A set of a mixture, completed by the keys of its choice if that YAML is at hand."""
    choice = str(part["data"])
    known = load_choice("data", choice) if choice_path("data", choice).is_file() else {}
    return {**known, **part, "name": f"{name}: {Path(choice).stem}"}


def _is_of_hub(part: Mapping[str, Any]) -> bool:
    return bool(part.get("hub")) and part.get("pretrained", True) and not part.get("weights")


def _licence(group: str, part: Mapping[str, Any]) -> str:
    """The known licence of a part's weights or of the training data."""
    name, is_of_hub = str(part["name"]), _is_of_hub(part)
    if group == "data":
        repo = part.get("repo")
        page = f"https://huggingface.co/datasets/{quote(repo)}" if repo else "the page of its source"
        return f"- data `{_plain(name)}`: see {page}"
    stated = f"see https://huggingface.co/{quote(part['hub'])}" if is_of_hub else "see the page of its source"
    # A shipped YAML states the licence of the repository that it names; a run may have used another one.
    if is_of_hub and name in choices(group) and load_choice(group, name).get("hub") == part["hub"]:
        text = choice_path(group, name).read_text(encoding="utf-8")
        known = re.search(r"License of the weights: (.+?)\.$", text, re.MULTILINE)
        stated = known[1] if known else stated
    return f"- {'LLM' if group == 'llm' else 'vision tower'} `{_plain(name)}`: {stated}"


def _plain(text: object) -> str:
    """Escapes a user's text for one line of Markdown: no tags, backticks or newlines."""
    return html.escape(" ".join(str(text).replace("`", "'").split()))


def _scores(run: Path | None) -> dict[str, dict[str, Any]]:
    """The content of a run's `metrics.json` files, by the name of their folder."""
    paths = sorted((run / "eval").glob("*/metrics.json")) if run else []
    return {path.parent.name: read_result(path, ("benchmark", "n")) for path in paths}


def _composition(config: DictConfig, vlm: VLM, llm: LanguageModel, run: Path | None) -> str:
    """The parts of the model, its training and its scores."""
    recipe = config.recipe
    height, width = vlm.projector.out_grid
    parameters = sum(p.numel() for p in vlm.parameters())
    steps = f"{recipe.max_steps} steps" if recipe.max_steps else f"{recipe.epochs} epochs"
    data = f"`{_plain(config.data.name)}`"
    manifest = read_json(run / "manifest.json") if run and (run / "manifest.json").is_file() else {}
    if "data_hash" in manifest:
        data += f", hash `{manifest['data_hash']}`"
    licences = "\n".join(
        _licence(group, part) for group in ("backbone", "llm", "data") for part in _parts(config, group)
    )
    names = {group: _plain(config[group].name) for group in ("backbone", "projector", "llm")}
    return f"""\
# {_plain(config.run_id or "A vision-language model")}

| part | choice |
|---|---|
| vision backbone ({recipe.tower}) | `{names["backbone"]}`, {vlm.backbone.image_size} px, {config.backbone.resize} |
| projector | `{names["projector"]}`, {vlm.backbone.num_patches} patches to {height}x{width} visual tokens |
| LLM | `{names["llm"]}`, {llm.max_positions} positions |
| parameters | {parameters:,} |
| data | {data} |
| recipe | `{_plain(recipe.name)}`: {steps} of {recipe.global_batch_size} records, learning rate {recipe.lr:g} |
| seed | {config.seed} |
{_score_table(_scores(run))}
## Licences

{licences}
"""


def _score_table(scores: dict[str, dict[str, Any]]) -> str:
    if not scores:
        return ""
    lines = ["\n## Scores\n", "| benchmark | metric | score | 95 % interval | questions |", "|---|---|---|---|---|"]
    for name, content in scores.items():
        value, (low, high) = content["metrics"][content["primary"]], content["interval95"]
        name, primary, count = map(_plain, (name, content["primary"], content["n"]))
        lines.append(f"| {name} | {primary} | {value:.1f} | {low:.1f} to {high:.1f} | {count} |")
    return "\n".join(lines) + "\n"
