"""The `model/` folder of a run: everything that `prism_deco.load` needs, in safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prism_deco.compose import build_model
from prism_deco.config import read_config, save_config
from prism_deco.llms import LanguageModel
from prism_deco.vlm import VLM

WEIGHTS = "model.safetensors"
TOWER = "backbone.safetensors"
TOWER_RECORD = "backbone.json"
CONFIG = "config.yaml"


def save_model(folder: Path, config: DictConfig, vlm: VLM, llm: LanguageModel) -> None:
    """Writes projector and LLM weights, the tokenizer, the configuration, and the frozen backbone: by
    the SHA-256 of its weights where they can be had again, whole where they were random."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG)
    save_file(_unique({k: v for k, v in vlm.state_dict().items() if not k.startswith("backbone.")}), folder / WEIGHTS)
    llm.tokenizer.save_pretrained(folder / "tokenizer")
    record = {"name": config.backbone.name, "sha256": vlm.backbone.sha256()}
    (folder / TOWER_RECORD).write_text(json.dumps(record, indent=2) + "\n")
    if not config.backbone.pretrained:
        save_file(_unique(vlm.backbone.state_dict()), folder / TOWER)


def load_model(folder: Path) -> tuple[VLM, LanguageModel, DictConfig]:
    """Rebuilds what `save_model` wrote, in eval mode.

    Raises:
        ValueError: a file is missing, a weight is missing or unexpected, or the backbone's weights
            are not those the model was trained with.
    """
    config = read_config(folder / CONFIG)
    for name in (WEIGHTS, TOWER_RECORD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: the run has not finished, or its folder is incomplete.")
    # The weights follow below: nothing needs to be fetched, drawn or read twice.
    bare = config.copy()
    bare.llm.pretrained = False
    bare.llm.tokenizer = str(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        vlm, llm = build_model(bare)
    load_strict(vlm, load_file(folder / WEIGHTS), str(folder / WEIGHTS), ignore="backbone.")
    if not config.backbone.pretrained:
        load_strict(vlm.backbone, load_file(folder / TOWER), str(folder / TOWER))
    wanted = json.loads((folder / TOWER_RECORD).read_text())["sha256"]
    if vlm.backbone.sha256() != wanted:
        raise ValueError(
            f"{folder}: the model was trained with backbone weights of SHA-256 {wanted[:12]}…, those of "
            f"{config.backbone.name} found here differ. Point backbone.weights at the original file."
        )
    return vlm.eval(), llm, config


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str, ignore: str | None = None) -> None:
    """Loads weights; `ValueError` names what is missing or unexpected.

    Parameters that share storage (tied embeddings) are stored once and may be missing under their
    other names; those that begin with `ignore` are loaded elsewhere.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    loaded = {p.data_ptr() for name, p in module.state_dict().items() if name in state}
    pointers = {name: p.data_ptr() for name, p in module.state_dict().items()}
    missing = [name for name in missing if not (ignore and name.startswith(ignore)) and pointers[name] not in loaded]
    if missing or unexpected:
        listed = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected]
        raise ValueError(f"{source} does not fit the model: {'; '.join(listed[:5])} ({len(listed)} in all).")


def _unique(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each storage once (safetensors refuses shared ones)."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        unique[name] = tensor.detach().cpu().contiguous()
    return unique
