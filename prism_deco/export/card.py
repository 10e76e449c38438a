"""The README of an exported folder."""

from __future__ import annotations

from omegaconf import DictConfig

import prism_deco
from prism_deco.llms import LanguageModel
from prism_deco.vlm import VLM


def card(config: DictConfig, vlm: VLM, llm: LanguageModel) -> str:
    """What the folder holds, how it came about and how to use it, in Markdown with the hub's header."""
    files = """\
| file | what it is |
|---|---|
| `model*.safetensors` | projector and LLM |
| `backbone*.safetensors` | the frozen vision tower |
| `backbone.json` | the tower's SHA-256, and how an image becomes its input |
| `llm.json` | the LLM's architecture, as transformers writes it |
| `tokenizer/` | the tokenizer with the chat template |
| `config.yaml` | the configuration it was trained with |
"""
    plugins = ", ".join(config.plugins)
    needs = f"\nIt also needs the modules {plugins} on the Python path.\n" if plugins else ""
    usage = f"""\
```python
import prism_deco

model = prism_deco.load("THIS_FOLDER")
model.generate(["image.jpg"], ["What is in the image?"], max_new_tokens=64)
```

Raw questions: the chat template is applied. Nothing else is fetched or read.
Written by prism_deco {prism_deco.__version__}.
{needs}"""
    return f"{header()}{composition(config, vlm, llm)}\n## Use\n\n{usage}\n## Files\n\n{files}"


def header(library: str = "prism_deco") -> str:
    """The metadata that the hub reads."""
    return f"---\nlibrary_name: {library}\npipeline_tag: image-text-to-text\n---\n"


def composition(config: DictConfig, vlm: VLM, llm: LanguageModel) -> str:
    """The parts of the model and its training."""
    recipe = config.recipe
    height, width = vlm.projector.out_grid
    parameters = sum(p.numel() for p in vlm.parameters())
    steps = f"{recipe.max_steps} steps" if recipe.max_steps else f"{recipe.epochs} epochs"
    return f"""\
# {config.run_id or "A vision-language model"}

| part | choice |
|---|---|
| vision backbone (frozen) | `{config.backbone.name}`, {vlm.backbone.image_size} px, {config.backbone.resize} |
| projector | `{config.projector.name}`, {vlm.backbone.num_patches} patches to {height}x{width} visual tokens |
| LLM | `{config.llm.name}`, {llm.max_positions} positions |
| parameters | {parameters:,} |
| data | `{config.data.name}` |
| recipe | `{recipe.name}`: {steps} of {recipe.global_batch_size} records, learning rate {recipe.lr:g} |
| seed | {config.seed} |

The weights of the backbone and the LLM keep the licences they came with.
"""
