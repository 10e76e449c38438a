"""Converts a checkpoint into the model folder that the run would have written, had it ended at that step."""

from __future__ import annotations

import logging
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from prism_deco.backbones import build_backbone
from prism_deco.build import build_model, group, tune_tower
from prism_deco.config import read_config
from prism_deco.config.registry import require_imported
from prism_deco.errors import UsageError
from prism_deco.llms.tuning import tuning
from prism_deco.training.checkpoints import CHECKPOINTS, MODEL, Checkpoint, list_checkpoints
from prism_deco.training.manifest import check_owner
from prism_deco.training.model_folder import CONFIG, save_model

log = logging.getLogger(__name__)


def consolidate(run: Path, checkpoint: str, folder: Path) -> None:
    """Writes the model of a checkpoint for `prism_deco.load`, in one process on the CPU.

    Trained weights are copied from file to file one tensor at a time. Frozen weights are read, or drawn again from the
    run's seed, only if the model folder contains them.

    Args:
        run: the run's folder.
        checkpoint: name of the checkpoint, `step_NNNNNN`.
        folder: new, or empty.

    Raises:
        UsageError: there is no such checkpoint; it is damaged, incomplete or belongs to another run; or the run has
            plug-ins that are not imported.
    """
    config = read_config(run / CONFIG)
    require_imported(config.plugins, run / CONFIG)
    known = {path.name: path for path in list_checkpoints(run / CHECKPOINTS)}
    if checkpoint not in known:
        raise UsageError(f"{run} has no checkpoint {checkpoint}; it has: {', '.join(known) or 'none'}.")
    stored = Checkpoint(known[checkpoint])
    check_owner(stored, config)
    log.info("Reading %s", known[checkpoint])
    stored.verify()
    if config.backbone.pretrained and (config.llm.pretrained or tuning(config.recipe.lm).base):
        vlm, llm = build_model(config, device="meta")
        vlm.backbone = build_backbone(group(config, "backbone"))
        if config.recipe.tower != "frozen":
            tune_tower(vlm.backbone, config.recipe)
    else:
        pl.seed_everything(config.seed, workers=True, verbose=False)
        vlm, llm = build_model(config)
    # Tied weights are stored under the first of their names: reversed, so that the first one wins.
    names = {id(tensor): f"{MODEL}{name}" for name, tensor in reversed(vlm.state_dict(keep_vars=True).items())}
    if missing := [name for name, p in vlm.named_parameters() if p.requires_grad and names[id(p)] not in stored.shapes]:
        raise UsageError(f"{known[checkpoint]} is missing {missing[0]} ({len(missing)} of the trained weights in all).")

    def read(tensor: Tensor) -> Tensor:
        name = names[id(tensor)]
        return stored.read(name) if name in stored.shapes else tensor

    with torch.no_grad():
        for parameter in vlm.backbone.parameters():
            parameter.copy_(read(parameter))  # the model folder holds the tower's hash
    save_model(folder, config, vlm, llm, read=read)
