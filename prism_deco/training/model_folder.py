"""The `model/` folder of a run, from which `prism_deco.load` rebuilds the model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_deco.backbones import build_backbone
from prism_deco.build import build_model, compose_projector, group, prompt_options
from prism_deco.config import read_config, save_config
from prism_deco.config.load import CONFIG
from prism_deco.config.registry import require_imported
from prism_deco.errors import UsageError
from prism_deco.files import file_sha256, read_json, verify_sha256, write_json, write_whole
from prism_deco.llms import LanguageModel, build_llm
from prism_deco.llms.build import weights_record
from prism_deco.llms.layers import fill_buffers
from prism_deco.llms.lora import load_lora, save_lora
from prism_deco.llms.tuning import tuning
from prism_deco.tensors import all_finite, base_name, full, is_adapter, open_tensors, tensor_files, write_safetensors
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
TOWER = "backbone.safetensors"
TOWER_RECORD = "backbone.json"
LLM_RECORD = "llm.json"
BASE_RECORD = "base.json"
ADAPTER = "adapter"
TOWER_ADAPTER = "backbone_adapter"
ADAPTERS = {"lm": ADAPTER, "backbone": TOWER_ADAPTER}
"""Folders of the adapters, by submodule of the VLM."""
TOKENIZER = "tokenizer"
SUMS = "SHA256SUMS"
"""File of checksums, in the format of `sha256sum -c`."""

_TRAINED = ("model.safetensors", "adapter/adapter_model.safetensors")
_SUFFIXES = (".safetensors", ".json", ".model", ".jinja", ".txt")
"""Files with a checksum. `config.yaml` has none: users may point it at other copies of frozen weights."""


def model_folder(run: Path) -> Path:
    """The `model/` folder of a run; the folder itself if it has none, as an export."""
    return run / "model" if (run / "model").is_dir() else run


def save_model(
    folder: Path, config: DictConfig, vlm: VLM, llm: LanguageModel, *, read: Callable[[Tensor], Tensor] = full
) -> str:
    """Writes the model, the tokenizer and the configuration.

    Of frozen pretrained weights (tower or LLM, also under adapters) only the SHA-256 is written. Adapters go to folders
    of their own, in peft's format and in `adapter_dtype`.

    Sharded weights are gathered one by one, so all processes must call this; rank 0 writes.

    Args:
        read: returns the values to write for a tensor of the model.

    Returns:
        `trained_sha256` of the folder; empty on other ranks than 0.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    names_llm = config.llm.pretrained and not tuning(config.recipe.lm).base
    names_tower = config.backbone.pretrained and not tuning(config.recipe.tower).base
    weights: dict[str, Tensor] = {}
    tower: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    state = vlm.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    for name, tensor in state.items():
        if first[id(tensor)] != name:
            continue  # tied tensors are written once, under the first of their names
        if is_adapter(name):
            part, _, own = name.partition(".")
            adapters.setdefault(part, {})[own] = read(tensor).to(adapter_dtype(config))
        elif name.startswith("backbone."):
            tower[base_name(name.removeprefix("backbone."))] = tensor
        elif not (names_llm and name.startswith("lm.")):
            weights[base_name(name)] = tensor
    parts = {WEIGHTS: weights} if names_tower else {WEIGHTS: weights, TOWER: tower}
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG)
        (folder / SUMS).unlink(missing_ok=True)
    digests = {}
    for name, tensors in parts.items():
        digests[name] = write_safetensors(folder / name if is_main else None, tensors, read=read)
    if not is_main:
        vlm.backbone.sha256()  # takes part in gathering what rank 0 hashes in `describe_parts`
        return ""
    describe_parts(folder, config, vlm, llm)
    if names_llm:
        write_json(folder / BASE_RECORD, weights_record(llm.spec))
    for part, tensors in adapters.items():
        save_lora(vlm.get_submodule(part), folder / ADAPTERS[part], tensors)
    return trained_sha256(write_sums(folder, digests))


def adapter_dtype(config: DictConfig) -> torch.dtype:
    """The dtype that adapters are stored in: bfloat16 if the run computed with their bfloat16 values only."""
    return torch.bfloat16 if config.trainer.precision == "bf16-mixed" else torch.float32


def describe_parts(folder: Path, config: DictConfig, vlm: VLM, llm: LanguageModel) -> None:
    """Writes the tokenizer with the chat template, the LLM's architecture, and the tower's hash and transform."""
    llm.tokenizer.save_pretrained(folder / TOKENIZER)
    architecture = vlm.lm.config.to_diff_dict() | {"vocab_size": llm.embedding_rows}
    # These describe the files that the LLM was read from, not the ones written here.
    architecture = {k: v for k, v in architecture.items() if k not in ("_name_or_path", "quantization_config")}
    write_json(folder / LLM_RECORD, architecture)
    record = {"name": config.backbone.name, "sha256": vlm.backbone.sha256(), "transform": _transform(vlm)}
    write_json(folder / TOWER_RECORD, record)


def load_model(folder: Path, num_tokens: int | None = None) -> tuple[VLM, LanguageModel, DictConfig]:
    """Rebuilds the model that `save_model` or an export wrote, on the CPU and in eval mode.

    The model is built on the meta device and takes over the tensors of the files, so no LLM weights are initialised in
    vain, and weights are in memory once.

    Args:
        num_tokens: visual tokens per image, if not as in training.

    Raises:
        UsageError: a file is missing or damaged, the weights do not fit or are not finite, or the backbone's weights
            are not those the model was trained with.
    """
    config = read_config(folder / CONFIG)
    if num_tokens is not None:
        config.projector.num_tokens = num_tokens
    require_imported(config.plugins, folder / CONFIG)
    weights, tower = tensor_files(folder / WEIGHTS), tensor_files(folder / TOWER)
    for name, found in ((WEIGHTS, weights), (TOWER_RECORD, (folder / TOWER_RECORD).is_file())):
        if not found:
            raise UsageError(f"{folder / name} is missing: the run has not finished, or its folder is incomplete.")
    verify_model(folder)
    bare = _architecture_only(folder, config)
    vlm, llm = build_model(bare, device="meta")
    elsewhere = ["backbone."]
    if (folder / BASE_RECORD).is_file():
        vlm.lm = llm.model = _named_base(folder, bare)
        elsewhere.append("lm.")
    with torch.random.fork_rng(devices=[]):
        # Not on the meta device: a plug-in's projector may compute buffers that are in no file.
        vlm.projector = compose_projector(bare, vlm.backbone, llm, bare=True)
    load_weights(vlm, weights, elsewhere=elsewhere, assign=True)
    if tower:
        load_weights(vlm.backbone, tower, assign=True)
    else:
        vlm.backbone = build_backbone(group(config, "backbone"))
    _check_backbone(folder, config, vlm)
    for part, name in ADAPTERS.items():
        if (folder / name).is_dir():
            load_lora(vlm.get_submodule(part), folder / name)
    vlm.backbone.requires_grad_(False)
    check_finite(folder, vlm)
    return vlm.eval(), llm, config


def _architecture_only(folder: Path, config: DictConfig) -> DictConfig:
    """The configuration of the model without its adapters, with the folder's tokenizer and architecture."""
    bare = config.copy()
    bare.llm.tokenizer = str(folder / TOKENIZER)
    bare.recipe.lm, bare.recipe.tower = "full", "frozen"
    if bare.llm.get("architecture") is None and (folder / LLM_RECORD).is_file():
        OmegaConf.update(bare, "llm.architecture", read_json(folder / LLM_RECORD), force_add=True)
    return bare


def _check_backbone(folder: Path, config: DictConfig, vlm: VLM) -> None:
    record = read_json(folder / TOWER_RECORD, ["sha256"])
    if vlm.backbone.sha256() != record["sha256"]:
        raise UsageError(
            f"{folder}: the model was trained with backbone weights of SHA-256 {record['sha256'][:12]}…, those of "
            f"{config.backbone.name} found here differ. Point backbone.weights at the original file."
        )
    if record.get("transform", _transform(vlm)) != _transform(vlm):
        raise UsageError(
            f"{folder}: the model was trained on images prepared by {record['transform']}, this version prepares them "
            f"by {_transform(vlm)}. Use the version that manifest.json or README.md names."
        )


def check_finite(folder: Path, vlm: VLM) -> None:
    """`UsageError` if a weight or buffer that was read from a model folder contains NaN or infinity."""
    for name, tensor in vlm.state_dict().items():
        if not all_finite(tensor):
            raise UsageError(
                f"{folder}: {name} holds NaN or infinite numbers. Train the model again, or export an earlier "
                "checkpoint of the run (prism-deco export)."
            )


def _named_base(folder: Path, config: DictConfig) -> PreTrainedModel:
    """The base LLM of a folder that only records the LLM's hash, checked against that."""
    try:
        llm = build_llm(group(config, "llm"), **prompt_options(config))
        found = weights_record(llm.spec)
    except UsageError as error:
        raise UsageError(f"{folder} does not hold its language model, only its name: {error}") from error
    wanted = read_json(folder / BASE_RECORD, ["sha256"])
    if found["sha256"] != wanted["sha256"]:
        raise UsageError(
            f"{folder}: the model was trained on the weights of {wanted.get('hub') or wanted.get('path')} with SHA-256 "
            f"{wanted['sha256'][:12]}…, those found here differ. Set llm.weights (or llm.revision) in "
            f"{folder / CONFIG} to the original ones."
        )
    return llm.model


def load_weights(
    module: nn.Module, files: Sequence[Path], *, elsewhere: Sequence[str] = (), assign: bool = False
) -> None:
    """Loads the tensors of safetensors files into a model; leaves its adapters, if any, unchanged.

    Args:
        elsewhere: prefixes of names that may be missing in the files.
        assign: replace the module's tensors, which may be on the meta device, instead of copying into them.

    Raises:
        UsageError: a file is missing or damaged, or its tensors do not fit the model.
    """
    own = module.state_dict(keep_vars=True)
    names = {base_name(name): name for name in own if not is_adapter(name)}
    stored: dict[int, Tensor] = {}
    wrong = []
    for file in files:
        for name, tensor in open_tensors(file).items():
            if name in names:
                stored[id(own[names[name]])] = tensor
            else:
                wrong.append(f"unexpected {name}")
    state = {}
    for name in names.values():
        # Tied parameters are one tensor with several names, stored under any one of them.
        if id(own[name]) in stored:
            state[name] = stored[id(own[name])]
        elif not name.startswith(tuple(elsewhere)):
            wrong.append(f"missing {name}")
    if wrong:
        raise UsageError(f"{files[0]} does not fit the model: {'; '.join(wrong[:5])} ({len(wrong)} in all).")
    try:
        module.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:
        raise UsageError(f"{files[0]} does not fit the model: {error}") from error
    if assign:
        for part in module.children():
            if isinstance(part, PreTrainedModel):
                part.tie_weights()
                fill_buffers(part)


def write_sums(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Writes `SHA256SUMS` and returns its content; call this after the other files are written.

    Args:
        known: checksums that are known already, by file name.
    """
    digests = dict(known)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _SUFFIXES and name not in digests:
            digests[name] = file_sha256(path)
    write_whole(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
    return digests


def verify_model(folder: Path) -> None:
    """Compares the files of a model folder with their checksums, and the weights' with that in `manifest.json`.

    Raises:
        UsageError: a file is missing, was damaged or was replaced.
    """
    if not (folder / SUMS).is_file():
        log.info("%s has no checksums and is not verified", folder)
        return
    digests = read_sums(folder)
    hint = "Restore the folder from a copy, or write the model again from a checkpoint (prism-deco export)."
    verify_sha256(folder, digests, folder / SUMS, hint)
    manifest = folder.parent / "manifest.json"
    if folder.name == "model" and manifest.is_file():
        trained = read_json(manifest).get("model_sha256")
        if trained not in (None, trained_sha256(digests)):
            raise UsageError(f"{folder} is not the model that the run trained: {manifest} names another. {hint}")


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums in `SHA256SUMS`, by file name."""
    digests = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        digests[name] = digest
    return digests


def trained_sha256(digests: Mapping[str, str]) -> str:
    """SHA-256 of the weights that `save_model` wrote, from a folder's checksums by file name; with adapters, the
    SHA-256 of both files' hashes."""
    hashes = [digests[name] for name in _TRAINED if name in digests]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _transform(vlm: VLM) -> dict[str, Any]:
    """How an image is prepared for each tower, as JSON."""
    towers = {name: asdict(tower) for name, tower in vlm.backbone.transform.towers.items()}
    return json.loads(json.dumps(towers))
