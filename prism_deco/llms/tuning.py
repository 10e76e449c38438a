"""Which weights of a language model or a vision tower are trained, and the format of its frozen weights."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from prism_deco.config.registry import unknown
from prism_deco.config.schema import LM
from prism_deco.errors import UsageError
from prism_deco.llms.lora import add_lora

QUANTIZATIONS = ("nf4",)
"""The choices of `llm.quantize`."""


@dataclass(frozen=True)
class Tuning:
    """One way to train an LLM or a tower.

    Attributes:
        base: train the model's own weights; otherwise they stay unchanged, bit for bit.
        adapters: add LoRA adapters and train them.
        quantize: hold the weights in this format (`LLMSpec.quantize`).
    """

    base: bool
    adapters: bool
    quantize: str | None = None

    def apply(self, model: PreTrainedModel, *, r: int, alpha: int, dropout: float, source: str | None = None) -> None:
        """Freezes what is not trained, and adds adapters if there are any (see `add_lora`)."""
        model.requires_grad_(self.base)
        if self.adapters:
            add_lora(model, r=r, alpha=alpha, dropout=dropout, base=source)


_FULL, _FROZEN, _LORA, _QLORA = LM
TUNINGS = {
    _FULL: Tuning(base=True, adapters=False),
    _FROZEN: Tuning(base=False, adapters=False),
    _LORA: Tuning(base=False, adapters=True),
    _QLORA: Tuning(base=False, adapters=True, quantize="nf4"),
}
"""The choices of `recipe.lm` and `recipe.tower`."""


def tuning(name: str) -> Tuning:
    """The tuning called `name`; `UsageError` if there is none."""
    if name not in TUNINGS:
        raise unknown("recipe.lm", name, TUNINGS)
    return TUNINGS[name]


def quantization(kind: str) -> dict[str, Any]:
    """Options of `from_pretrained` to quantise all linear layers except the output head, on this process's GPU.

    Four bits per weight, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes.

    Raises:
        UsageError: the kind is unknown, a package is missing, or there is no GPU.
    """
    if kind not in QUANTIZATIONS:
        raise unknown("llm.quantize", kind, QUANTIZATIONS)
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"Four-bit weights (recipe.lm=qlora) need {' and '.join(missing)}: pip install 'prism-deco[qlora]', or "
            "train adapters on unquantised weights with recipe.lm=lora."
        )
    if not torch.cuda.is_available():
        raise UsageError(
            "Four-bit weights (recipe.lm=qlora) need a CUDA GPU, and torch sees none here. Train adapters on "
            "unquantised weights instead: recipe.lm=lora."
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # Lightning starts one process per GPU and sets this variable for each.
    return {"quantization_config": config, "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}
