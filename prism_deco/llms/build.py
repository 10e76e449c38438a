"""Builds language models from their YAML."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from prism_deco.config import load_choice
from prism_deco.config.choices import with_set
from prism_deco.errors import UsageError
from prism_deco.exits import as_stop
from prism_deco.files import file_sha256
from prism_deco.llms.base import LanguageModel
from prism_deco.llms.hub import ASSET, MODEL_FILES, WEIGHTS, has_weights, snapshot, weight_files
from prism_deco.llms.spec import LLMSpec, architecture, read_spec
from prism_deco.llms.tuning import quantization
from prism_deco.llms.weights import as_safetensors, check_folder, load_lm
from prism_deco.tensors import open_tensors

log = logging.getLogger(__name__)


def build_llm(
    choice: str | Mapping[str, Any],
    *,
    pretrained: bool | None = None,
    device: torch.device | str | None = None,
    prompt_set: str | None = None,
    **options: Any,
) -> LanguageModel:
    """Builds a language model.

    Args:
        choice: name of a YAML in `conf/llm`, or its content as a mapping.
        pretrained: load weights, or draw random ones from torch's global generator; None follows the YAML.
        device: where the model lives; "meta" builds the bare architecture and loads nothing.
        prompt_set: one of the YAML's `prompt_sets`; None keeps its top-level format.
        options: override keys of the YAML (`LLMSpec`).

    Raises:
        UsageError: a key or choice is unknown, or weights cannot be found or do not fit.
    """
    content = load_choice("llm", choice) if isinstance(choice, str) else dict(choice)
    spec = read_spec(with_set({"llm": content}, prompt_set)["llm"] | options)
    pretrained = spec.pretrained if pretrained is None else pretrained
    device = torch.device(device or "cpu")
    if spec.quantize and not pretrained:
        raise UsageError(f"{spec.name}: only pretrained weights can be quantised; train adapters with recipe.lm=lora.")
    model = _load(spec) if pretrained and device.type != "meta" else _random(spec, device)
    llm = LanguageModel(model, spec)
    _fit_embeddings(llm)
    # Drop the checkpoint's sampling settings and repetition penalties: decoding is greedy here.
    model.generation_config = GenerationConfig()
    if spec.quantize is None:
        model.to(device)  # type: ignore[arg-type]
    return llm


def check_llm_weights(spec: LLMSpec) -> None:
    """`UsageError` if pretrained weights are neither on this machine nor available from the hub, or a folder is
    incomplete."""
    if spec.pretrained and not spec.weights:
        _hub_folder(spec, dry_run=True)
    elif spec.pretrained and (path := _weights_path(spec)).is_dir():
        check_folder(path)


def weights_record(spec: LLMSpec) -> dict[str, Any]:
    """Identifies pretrained weights: their source and the SHA-256 of their files.

    Raises:
        UsageError: they cannot be found.
    """
    path = _weights_path(spec)
    if spec.weights:
        source = {"path": spec.weights if spec.weights.startswith(ASSET) else str(path.resolve())}
    else:
        source = {"hub": spec.hub, "revision": path.name}  # a snapshot's folder is named after its commit
    files = weight_files(path)
    digest = _hash_files(tuple(files), tuple(file.stat().st_mtime_ns for file in files))
    return {"name": spec.name, **source, "sha256": digest}


@lru_cache(maxsize=4)
def _hash_files(files: tuple[Path, ...], _times: tuple[int, ...]) -> str:
    """One SHA-256 of several files, cached: a run needs it at its start and its end, and they may be tens of GB."""
    log.info("Hashing the language model's weights in %s", files[0].parent)
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def weight_map(spec: LLMSpec) -> dict[str, Path] | None:
    """The safetensors file of each weight, to read them one by one; None if there are no such files.

    Raises:
        UsageError: the weights cannot be found, or belong to another architecture.
    """
    path = _weights_path(spec)
    if not path.is_dir() or not has_weights(path):
        return None  # a single file, or nothing that `load_lm` accepts
    _check_architecture(spec, AutoConfig.from_pretrained(path, trust_remote_code=False), path)
    files: dict[str, Path] = {}
    for file in weight_files(as_safetensors(path)):
        files |= dict.fromkeys(open_tensors(file), file)
    return files


def _options(spec: LLMSpec) -> dict[str, Any]:
    return {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attention}


def _random(spec: LLMSpec, device: torch.device) -> PreTrainedModel:
    try:
        with device:
            return AutoModelForCausalLM.from_config(architecture(spec), trust_remote_code=False, **_options(spec))
    except Exception as error:  # of any class: failed validation, assertions, look-ups, and torch's size errors
        if isinstance(error, UsageError) or as_stop(error):
            raise
        if isinstance(error, ImportError | ValueError) and (named := _attention_error(spec, error)):
            raise named from error
        if not CONFIG_MAPPING[(spec.architecture or {})["model_type"]].__module__.startswith("transformers."):
            raise  # a plug-in's bug
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"transformers cannot build the architecture of {spec.name} (llm.architecture): {reason}"
        ) from error


def _attention_error(spec: LLMSpec, error: Exception) -> UsageError | None:
    """The error to raise if `llm.attention` is not installed or the architecture does not support it; else None."""
    if isinstance(error, ValueError) and "attn_implementation" not in str(error):
        return None
    reason = str(error).strip().partition(". ")[0].removesuffix(".")
    other = "Install what it needs, or set llm.attention=sdpa."
    hint = "Set llm.attention=eager." if spec.attention == "sdpa" else other
    return UsageError(f"llm.attention={spec.attention} cannot be used here: {reason}. {hint}")


def _load(spec: LLMSpec) -> PreTrainedModel:
    if spec.architecture:
        _random(spec, torch.device("meta"))  # reports a wrong architecture before any weights are read
    config = architecture(spec) if spec.architecture else None
    path = _weights_path(spec)
    options = _options(spec) | (quantization(spec.quantize) if spec.quantize else {})
    try:
        model = load_lm(path, config, **options)
    except UsageError as error:
        if named := _attention_error(spec, error):
            raise named from error
        raise
    _check_architecture(spec, model.config, path)
    return model


def _check_architecture(spec: LLMSpec, config: PretrainedConfig, path: Path) -> None:
    for key, value in (spec.architecture or {}).items():
        found = getattr(config, key, value)
        if isinstance(value, float) and isinstance(found, float):
            is_same = math.isclose(value, found, rel_tol=1e-6)  # GGUF files hold 32 bits
        else:
            # The vocabulary may have been resized, and nested values can be written in several ways.
            is_same = key == "vocab_size" or not isinstance(value, int | float | str) or found == value
        if not is_same:
            raise UsageError(f"The weights in {path} are not those of {spec.name}: {key} is {found}, not {value}.")


def _weights_path(spec: LLMSpec) -> Path:
    if not spec.weights:
        return _hub_folder(spec)
    if spec.weights.startswith(ASSET):
        return WEIGHTS / f"{spec.weights.removeprefix(ASSET)}.safetensors"
    return Path(spec.weights).expanduser()


def _hub_folder(spec: LLMSpec, *, dry_run: bool = False) -> Path:
    if spec.hub is None:
        raise UsageError(
            f"{spec.name} has no pretrained weights to download: set llm.weights=PATH to your own, or start from "
            "random ones with llm.pretrained=false."
        )
    size = ""
    if spec.architecture:
        size = f", about {2 * _random(spec, torch.device('meta')).num_parameters() / 1e9:.1f} GB in half precision"
    hint = (
        f"The weights of {spec.name} (repository {spec.hub}{size}) are not in the local Hugging Face cache and could "
        "not be downloaded. Copy the repository's files here and set llm.weights=PATH, or start from random weights "
        "with llm.pretrained=false."
    )
    return snapshot(spec.hub, spec.revision, has_weights, MODEL_FILES, hint, dry_run)


def _fit_embeddings(llm: LanguageModel) -> None:
    """Resizes the embedding tables to the tokenizer; tied tables stay tied."""
    spec = llm.spec
    model = llm.model
    rows = llm.embedding_rows
    multiple = spec.pad_to_multiple_of
    if not spec.added_tokens or (multiple is None and spec.tokenizer_size is None):
        return  # `LanguageModel.tokenizer` checks that there are enough rows
    size = spec.tokenizer_size or len(llm.tokenizer)
    wanted = -(-size // multiple) * multiple if multiple else max(size, rows)
    if wanted != rows:
        # As in the reference, new rows follow the architecture's initialisation, not the mean of the old rows.
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(wanted, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = cast(nn.Embedding, table).weight
            if wanted > rows and not weight.is_meta:
                weight.data[rows:] = added_rows(wanted - rows, weight.shape[1], model.config.initializer_range)


def added_rows(count: int, width: int, std: float) -> Tensor:
    """float32[count, width]: embedding rows for added tokens.

    Drawn from a fixed seed: a run that stores only the name of its base model must get the same rows at every load, in
    every process.
    """
    return torch.empty(count, width).normal_(std=std, generator=torch.Generator().manual_seed(0))
