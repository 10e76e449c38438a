"""The keys of a language model's YAML, and its architecture."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _CAUSAL_LMS

from prism_deco.config.registry import unknown
from prism_deco.config.schema import AS_TRAINED
from prism_deco.errors import UsageError

_TYPO = 0.94
"""Similarity (`difflib`) above which an unknown key is taken for a typo; keys of other architectures are less alike."""


@dataclass(frozen=True)
class LLMSpec:
    """The keys of `conf/llm/*.yaml`."""

    name: str
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token`, `pad_token`; a pad token that the tokenizer lacks is added."""
    chat_template: str | None = None
    """Jinja source of the chat format (`prism_deco/llms/prompts.py`); None: the tokenizer's own (`own_template.py`)."""
    hub: str | None = None
    """Repository of the weights, and of the tokenizer."""
    revision: str | None = None
    """A commit of the repository; None is the newest."""
    pretrained: bool = True
    """Load weights; false starts from random ones."""
    weights: str | None = None
    """Local folder, .safetensors, .gguf or .bin file, or `asset:<name>` of the package; None: the hub's weights."""
    tokenizer: str | None = None
    """Local folder, repository, or `asset:<name>` of the package; None: next to the weights, or from `hub`."""
    architecture: Mapping[str, Any] | None = None
    """`model_type` and its settings, as in the checkpoint's config.json, to build the model without any file."""
    tokenizer_size: int | None = None
    """Size of the tokenizer, added tokens included; None asks the tokenizer."""
    pad_to_multiple_of: int | None = None
    """Rounds the rows of the embedding tables up to a multiple of this; None keeps the tables unless too small."""
    added_tokens: bool = True
    """Add a pad token that the tokenizer lacks; false pads with the unknown token instead and leaves the embedding
    tables as they are (LLaVA)."""
    stop_tokens: Sequence[str] = ()
    """Tokens that end an answer; empty: `eos_token`."""
    tokenize: str = "per_turn"
    """per_turn: each turn separately (PRISM) | whole: the conversation at once (LLaVA)."""
    image_slot: str = "after_bos"
    """after_bos (PRISM) | after_first_token (DeCo's authors) | in_place (LLaVA)."""
    prompt: str = "chat"
    """chat: `chat_template` | plain: LLaVA's alignment prompt, image and caption only."""
    asks: Mapping[str, str | None] | None = None
    """Alternative prompts for a question (`evaluate.ask`), by name: text with `{question}`, and with `{image}` unless
    `image_slot` is after_first_token. A value of None is as trained."""
    quantize: str | None = None
    """nf4: four bits per weight of the linear layers, through bitsandbytes on a GPU (QLoRA); None: `dtype`."""
    dtype: str = "float32"
    """Dtype of the weights; PRISM trains float32 master weights."""
    attention: str = "sdpa"
    """Attention implementation of transformers: sdpa | eager | flash_attention_2 ..."""


def read_spec(content: Mapping[str, Any]) -> LLMSpec:
    """Validates the content of a YAML; `UsageError` if a key is unknown or missing."""
    known = [f.name for f in fields(LLMSpec)]
    for key in content:
        if key not in known:
            raise unknown("key of an LLM", key, known)
    for key in ("name", "special_tokens"):
        if not content.get(key):
            raise UsageError(f"The LLM {content.get('name', '')!r} has no `{key}`: set it in its YAML.")
    spec = LLMSpec(**content)
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise UsageError(f"llm.dtype={spec.dtype} is not a torch dtype: choose float32, bfloat16 or float16.")
    return spec


def check_ask(spec: LLMSpec, ask: str) -> None:
    """`UsageError` unless `ask` is `AS_TRAINED` or one of the LLM's `asks`."""
    known = [AS_TRAINED, *(spec.asks or {})]
    if ask not in known:
        raise unknown(f"way to ask {spec.name}", ask, known)


def architecture(spec: LLMSpec) -> PretrainedConfig:
    """The architecture as a configuration of transformers; nothing is read or downloaded."""
    if spec.architecture is None:
        raise UsageError(f"{spec.name} has no `architecture`, which is required to build it without weights.")
    if not isinstance(spec.architecture, Mapping) or "model_type" not in spec.architecture:
        raise UsageError(f"The architecture of {spec.name} has no model_type; add, for example, `model_type: llama`.")
    kind = str(spec.architecture["model_type"])
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise unknown(f"model_type of a causal LM (llm.architecture of {spec.name})", kind, _CAUSAL_LMS)
    config_class = CONFIG_MAPPING[kind]
    known = [field.name for field in fields(config_class)] + list(config_class.attribute_map)
    for key in map(str, spec.architecture):
        # transformers accepts any key, and published configurations have some that their class does not define.
        near = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=_TYPO)
        if near and not hasattr(config_class(), key):
            raise UsageError(f"llm.architecture.{key} of {spec.name} has no effect: did you mean {near[0]}?")
    return AutoConfig.for_model(**spec.architecture)
