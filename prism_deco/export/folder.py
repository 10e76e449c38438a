"""Writes a model to one self-contained folder that `prism_deco.load` reads."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from prism_deco.config import compose, load_choice, save_config
from prism_deco.config.choices import YAML_SUFFIXES
from prism_deco.errors import UsageError
from prism_deco.exits import is_disk_full
from prism_deco.export.card import card
from prism_deco.llms import LanguageModel
from prism_deco.llms.lora import has_lora, merge_lora
from prism_deco.training.model_folder import CONFIG, TOWER, WEIGHTS, describe_parts, write_sums
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

SHARD_SIZE = "4GB"
"""Largest weights file. Saving copies one file's tensors at a time, so this also bounds the memory it takes."""

_BUILDING = ".building"


def save_folder(
    folder: Path,
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
    run: Path | None = None,
) -> None:
    """Writes the whole model, its tower included.

    Args:
        folder: new, or empty.
        vlm: changed in place: LoRA adapters are merged, and `dtype` is applied.
        dtype: of the weights; None keeps it.
        max_shard_size: larger weights are split into several files with an index.
        run: the run folder, for the scores in the README.

    Raises:
        UsageError: the folder is not empty, or the disk is full.
    """
    check_empty(folder)
    merge_adapters(vlm)
    if dtype is not None:
        vlm.cast(dtype)  # after merging, which should happen in full precision
    state = vlm.state_dict()
    parts = {
        WEIGHTS: {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")},
        TOWER: vlm.backbone.state_dict(),
    }
    with whole_folder(folder, stored_bytes(state)) as building:
        for file, tensors in parts.items():
            # "model.safetensors" -> "model{suffix}.safetensors": shards get numbers as their suffix.
            pattern = file.replace(".", "{suffix}.", 1)
            save_torch_state_dict(tensors, building, filename_pattern=pattern, max_shard_size=max_shard_size)
        shipped = portable(config)
        save_config(shipped, building / CONFIG)
        describe_parts(building, shipped, vlm, llm)
        finish_folder(building, card(config, vlm, llm, run))


def check_empty(folder: Path) -> None:
    """Raises `UsageError` if the folder exists and is not empty."""
    if folder.exists() and any(path.name != _BUILDING for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty. Export to a new folder.")


@contextmanager
def whole_folder(folder: Path, need: int | None = None) -> Iterator[Path]:
    """A temporary folder to write to, whose files move to `folder` at the end, or are removed after an error.

    Args:
        folder: new, or empty (`check_empty`).
        need: approximate bytes to write; None if unknown.
    """
    log.info("Writing the model to %s", folder)
    exists = folder.exists()
    # Inside the folder, so that moving the files to it is a renaming on the same disk.
    building = folder / _BUILDING
    shutil.rmtree(building, ignore_errors=True)  # left by an export that was killed
    building.mkdir(parents=True)
    try:
        if need is not None and shutil.disk_usage(building).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield building
        for path in building.iterdir():
            path.rename(folder / path.name)
    except Exception as error:
        if not is_disk_full(error):
            raise
        wanted = "" if need is None else f" It needs about {need / 1e6:.1f} MB."
        free = shutil.disk_usage(building).free / 1e6
        raise UsageError(
            f"The export to {folder} could not be written: {error} ({free:.1f} MB free).{wanted} Free some "
            "space, or name a folder on another disk."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if not exists and not any(folder.iterdir()):
            folder.rmdir()


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of tensors in a file, which stores tensors with shared memory once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())


def finish_folder(folder: Path, card: str) -> None:
    """Writes `README.md` and checksums. Gives the weights its permissions: safetensors writes for the owner only."""
    readme = folder / "README.md"
    readme.write_text(card, encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        file.chmod(readme.stat().st_mode)
    write_sums(folder, {})


def merge_adapters(vlm: VLM) -> None:
    """Merges LoRA adapters into the weights of the LLM and of the tower, if there are any."""
    for part in (vlm.lm, vlm.backbone):
        if has_lora(part):
            log.info("Merging the LoRA adapters into the %s", type(part).__name__)
            merge_lora(part)


def portable(config: DictConfig) -> DictConfig:
    """The configuration with local paths reduced to the names of their files and folders.

    The user's own YAML files of an ensemble's towers are replaced by their content.
    """
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    towers = content["backbone"].get("towers") or []
    if towers:
        content["backbone"]["towers"] = [_choice(tower) for tower in towers]
    content["recipe"]["lm"] = "full"  # adapters are merged
    if content["recipe"]["tower"] != "frozen":
        content["recipe"]["tower"] = "full"
    return compose(_without_paths(content) | {"runs_dir": "runs"})


def _choice(tower: Any) -> Any:
    return load_choice("backbone", tower) if str(tower).endswith(YAML_SUFFIXES) else tower


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    # Other values with a slash are names of hub repositories, URLs, and chat templates (several lines).
    if "\n" in text or "/" not in text or "://" in text:
        return False
    return text.startswith(("/", "~", "./", "../")) or Path(text).exists()
