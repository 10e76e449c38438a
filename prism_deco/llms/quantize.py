"""Four-bit base weights for QLoRA, through bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError

KINDS = ("nf4",)


def quantization(kind: str) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise the linear layers but the output head, on this process's GPU.

    Raises:
        UsageError: the kind is unknown, a package is missing, or there is no GPU.
    """
    if kind not in KINDS:
        raise unknown("llm.quantize", kind, KINDS)
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"Four-bit weights (recipe.lm=qlora) need {' and '.join(missing)}: pip install 'prism-deco[qlora]', or "
            "train adapters on unquantised weights: recipe.lm=lora."
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
    # Lightning starts one process per GPU and tells each its own by this variable.
    return {"quantization_config": config, "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}
