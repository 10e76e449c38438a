"""The keys of a language model's YAML, and its architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError


@dataclass(frozen=True)
class LLMSpec:
    """The keys of `conf/llm/*.yaml`."""

    name: str
    chat_template: str
    """Jinja source of the chat format; see `prism_deco/llms/prompts.py`."""
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token`, `pad_token`; one that the tokenizer does not know (a pad token) is added."""
    hub: str | None = None
    """Repository of the weights, and of the tokenizer."""
    revision: str | None = None
    """A commit of the repository; None is its newest."""
    pretrained: bool = True
    """Load weights; false starts from random ones."""
    weights: str | None = None
    """Local folder, or .safetensors, .gguf or .bin file, instead of the hub's weights."""
    tokenizer: str | None = None
    """Local folder, repository, or `asset:<name>` of the package; None: beside the weights, or `hub`."""
    architecture: Mapping[str, Any] | None = None
    """`model_type` and its numbers, as in the checkpoint's config.json: builds the model without any file."""
    tokenizer_size: int | None = None
    """Tokens of the tokenizer, added ones included; None asks the tokenizer."""
    pad_to_multiple_of: int | None = None
    """Embedding tables get the tokenizer's size rounded up to a multiple of it; None keeps them unless too small."""
    added_tokens: bool = True
    """Add a pad token that the tokenizer does not know; false pads with its unknown token then, and keeps the embedding
    tables as they are (LLaVA)."""
    stop_tokens: Sequence[str] = ()
    """Tokens that end an answer; empty: `eos_token`."""
    tokenize: str = "per_turn"
    """per_turn: each turn by itself (PRISM) | whole: the conversation at once (LLaVA)."""
    image_slot: str = "after_bos"
    """after_bos (PRISM) | in_place (LLaVA)."""
    prompt: str = "chat"
    """chat: `chat_template` | plain: LLaVA's alignment prompt, image and caption only."""
    quantize: str | None = None
    """nf4: four bits per weight of the linear layers, through bitsandbytes on a GPU (QLoRA); None: `dtype`."""
    dtype: str = "float32"
    """Type of the weights; PRISM trains float32 master weights."""
    attention: str = "sdpa"
    """Attention of transformers: sdpa | eager | flash_attention_2 ..."""


def read_spec(content: Mapping[str, Any]) -> LLMSpec:
    """Checks the content of a YAML; `UsageError` names keys that are unknown or missing."""
    known = [f.name for f in fields(LLMSpec)]
    for key in content:
        if key not in known:
            raise unknown("key of an LLM", key, known)
    for key in ("name", "chat_template", "special_tokens"):
        if not content.get(key):
            raise UsageError(f"The LLM {content.get('name', '')!r} has no `{key}`: its YAML must set it.")
    spec = LLMSpec(**content)
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise UsageError(f"llm.dtype={spec.dtype} is no type of torch: float32, bfloat16 or float16.")
    return spec


def architecture(spec: LLMSpec) -> PretrainedConfig:
    """The architecture as transformers knows it; nothing is read or fetched."""
    if spec.architecture is None:
        raise UsageError(f"{spec.name} has no `architecture`: it is needed to build the model without its weights.")
    if "model_type" not in spec.architecture:
        raise UsageError(f"The architecture of {spec.name} has no model_type, for example `model_type: llama`.")
    return AutoConfig.for_model(**spec.architecture)
