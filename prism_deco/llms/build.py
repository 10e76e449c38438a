"""From a YAML to a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from prism_deco.config import load_choice
from prism_deco.llms.base import LanguageModel
from prism_deco.llms.hub import model_folder
from prism_deco.llms.spec import LLMSpec, architecture, read_spec
from prism_deco.llms.weights import load_model


def build_llm(
    choice: str | Mapping[str, Any],
    *,
    pretrained: bool | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> LanguageModel:
    """Builds a language model.

    Args:
        choice: a YAML name under `conf/llm`, or the mapping such a YAML holds.
        pretrained: load weights, or draw random ones from torch's global generator; None: as the YAML says.
        device: where the model lives; on "meta" it is the bare architecture, and nothing is loaded.
        options: replace the YAML's keys (`LLMSpec`).

    Raises:
        ValueError: an unknown key or choice, weights that cannot be found or do not fit.
    """
    spec = read_spec((load_choice("llm", choice) if isinstance(choice, str) else dict(choice)) | options)
    pretrained = spec.pretrained if pretrained is None else pretrained
    device = torch.device(device or "cpu")
    model = _load(spec) if pretrained and device.type != "meta" else _random(spec, device)
    llm = LanguageModel(model, spec)
    _fit_embeddings(llm)
    # Checkpoints bring sampling settings and repetition penalties of their own; decoding here is plain.
    model.generation_config = GenerationConfig()
    model.to(device)  # type: ignore[arg-type]
    return llm


def _options(spec: LLMSpec) -> dict[str, Any]:
    return {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attention}


def _random(spec: LLMSpec, device: torch.device) -> PreTrainedModel:
    with device:
        return AutoModelForCausalLM.from_config(architecture(spec), trust_remote_code=False, **_options(spec))


def _load(spec: LLMSpec) -> PreTrainedModel:
    config = architecture(spec) if spec.architecture else None
    path = Path(spec.weights).expanduser() if spec.weights else _hub_folder(spec)
    model = load_model(path, config, **_options(spec))
    for key, value in (spec.architecture or {}).items():
        found = getattr(model.config, key, value)
        # The vocabulary may have been resized since; a nested value may be spelled in several ways.
        if key != "vocab_size" and isinstance(value, int | str) and found != value:
            raise ValueError(f"The weights in {path} are not those of {spec.name}: {key} is {found}, not {value}.")
    return model


def _hub_folder(spec: LLMSpec) -> Path:
    if spec.hub is None:
        raise ValueError(
            f"{spec.name} has no pretrained weights to download: give your own (llm.weights=PATH), or start from "
            "random ones (llm.pretrained=false)."
        )
    size = ""
    if spec.architecture:
        size = f", about {2 * _random(spec, torch.device('meta')).num_parameters() / 1e9:.1f} GB in half precision"
    hint = (
        f"The weights of {spec.name} (repository {spec.hub}{size}) are neither in the local Hugging Face cache nor "
        "could they be downloaded. Copy the repository's files here and point to them: llm.weights=PATH "
        "(random weights: llm.pretrained=false)."
    )
    return model_folder(spec.hub, spec.revision, hint)


def _fit_embeddings(llm: LanguageModel) -> None:
    """Gives the embedding tables the rows that the tokenizer needs; tied tables stay tied."""
    spec, model = llm.spec, llm.model
    rows = llm.embedding_rows
    multiple = spec.pad_to_multiple_of
    if multiple is None and spec.tokenizer_size is None:
        return  # `LanguageModel.tokenizer` checks that they suffice
    size = spec.tokenizer_size or len(llm.tokenizer)
    wanted = -(-size // multiple) * multiple if multiple else max(size, rows)
    if wanted != rows:
        # New rows are drawn like any others of the architecture, as in the reference, not from the mean of the old.
        model.resize_token_embeddings(wanted, mean_resizing=False)
