"""A model in one folder that `prism_deco.load` reads with nothing else at hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from omegaconf import DictConfig, OmegaConf

from prism_deco.config import compose, load_choice, save_config
from prism_deco.errors import UsageError
from prism_deco.export.card import card
from prism_deco.llms import LanguageModel
from prism_deco.llms.lora import has_lora, merge_lora
from prism_deco.training.model_folder import CONFIG, TOWER, WEIGHTS, describe_parts
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

SHARD_SIZE = "4GB"
"""Largest weights file. Saving copies one file's tensors at a time, so this also bounds the memory it takes."""


def save_folder(
    folder: Path,
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Writes the whole model, its frozen tower included.

    Args:
        folder: new, or empty.
        vlm: LoRA adapters are merged into the LLM's weights, here as well as in the folder.
        dtype: type of the written weights, here as well; None keeps theirs.
        max_shard_size: weights above it are split into several files, with an index.

    Raises:
        UsageError: there is something in the folder already.
    """
    check_empty(folder)
    merge_adapters(vlm)
    if dtype is not None:
        vlm.cast(dtype)  # after merging, whose sums would else be rounded
    log.info("Writing the model to %s", folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = vlm.state_dict()
    parts = {
        WEIGHTS: {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")},
        TOWER: vlm.backbone.state_dict(),
    }
    for file, tensors in parts.items():
        pattern = file.replace(".", "{suffix}.", 1)
        save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=max_shard_size)
    shipped = portable(config)
    save_config(shipped, folder / CONFIG)
    describe_parts(folder, shipped, vlm, llm)
    write_card(folder, card(config, vlm, llm))


def check_empty(folder: Path) -> None:
    """`UsageError` if the folder exists and anything is in it."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: an export does not mix with other files. Name a new folder.")


def write_card(folder: Path, text: str) -> None:
    """Writes `README.md`, and lets those read the weights who may read it: safetensors keeps them to the owner."""
    readme = folder / "README.md"
    readme.write_text(text, encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        file.chmod(readme.stat().st_mode)


def merge_adapters(vlm: VLM) -> None:
    """Makes an LLM with LoRA adapters one without; others stay as they are."""
    if has_lora(vlm.lm):
        log.info("Merging the LoRA adapters into the language model")
        merge_lora(vlm.lm)


def portable(config: DictConfig) -> DictConfig:
    """The configuration without the paths of this machine: of a local file or folder the name remains.

    Choices that the towers of an ensemble have in YAML files of the user's are written out.
    """
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    towers = content["backbone"].get("towers") or []
    if towers:
        content["backbone"]["towers"] = [_choice(tower) for tower in towers]
    content["recipe"]["lm"] = "full"  # adapters are merged
    return compose(_without_paths(content) | {"runs_dir": "runs"})


def _choice(tower: Any) -> Any:
    return load_choice("backbone", tower) if str(tower).endswith((".yaml", ".yml")) else tower


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    # Repositories of the hub have a slash, too; templates have many lines.
    if "\n" in text or "/" not in text or "://" in text:
        return False
    return text.startswith(("/", "~", "./", "../")) or Path(text).exists()
