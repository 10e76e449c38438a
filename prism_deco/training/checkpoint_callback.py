"""The callback that saves checkpoints during a run and resumes from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from prism_deco.errors import UsageError
from prism_deco.exits import Interrupted, Preempted, Preemption
from prism_deco.training.checkpoints import (
    MODEL,
    Checkpoint,
    checkpoint_name,
    prune_checkpoints,
    save_checkpoint,
)
from prism_deco.training.lightning_internals import run_validation, set_position
from prism_deco.training.module import TrainingModule
from prism_deco.training.progress import Metrics
from prism_deco.training.sharding import local_piece, reshard
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer."


@dataclass(eq=False)
class Checkpointing(Callback):
    """Saves every `trainer.checkpoint_every` steps, after the best validation, at the end, and when asked to stop.

    Attributes:
        folder: the run's `checkpoints`.
        resume: the checkpoint to resume from, if any.
        metrics: the run's metrics so far; None on all ranks but 0.
        settings: the `trainer` group of the configuration.
        about: description of the run, stored in each checkpoint (`manifest.provenance`).
    """

    folder: Path
    resume: Checkpoint | None
    metrics: Metrics | None
    settings: DictConfig
    about: Mapping[str, Any]
    preemption: Preemption

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.resume is None:
            return
        module: TrainingModule = pl_module
        step = self.resume.step
        optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        restore_tensors(self.resume, module.vlm, optimizer)
        saved = self.resume.content
        schedule.load_state_dict(saved["schedule"]["scheduler"])
        for group, rate in zip(optimizer.param_groups, saved["schedule"]["lr"], strict=True):
            group["lr"] = rate
        module.counts.update(saved["counts"])
        module.bad_rows.update(saved.get("bad_rows", []))
        set_position(trainer, step)
        # The process may have ended between this step and its validation: run that now. A later hook is too late: after
        # the last step Lightning has nothing left to train and calls none.
        validates = trainer.limit_val_batches and step % int(trainer.val_check_interval or 1) == 0
        missing = self.metrics is not None and step not in self.metrics.validated
        if validates and trainer.strategy.broadcast(missing):
            run_validation(trainer)
        # It may also have ended before it removed superseded checkpoints.
        self._prune()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.preemption.claim()  # Lightning installs its signal handlers after `on_fit_start`

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        module: TrainingModule = pl_module
        step = trainer.global_step
        every = self.settings.checkpoint_every
        interval = max(1, round(every * module.total_steps)) if every < 1 else int(every)
        if step % interval == 0 or step == module.total_steps or module.stop:
            self._save(trainer, module)
        if module.stop:
            happened = "interrupted" if module.stop is Interrupted else "preempted"
            reason = f"{happened} after step {step} of {module.total_steps}"
            raise module.stop(reason, agreed=True)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Stops a validation when asked to, since it may outlast a scheduler's grace period. The resumed run repeats
        it."""
        module: TrainingModule = pl_module
        asked = self.preemption.requested
        flags = torch.tensor([asked is not None, asked is Interrupted], dtype=torch.float64, device=module.device)
        total: Any = trainer.strategy.reduce(flags, reduce_op="sum")
        preempted, interrupted = total.tolist()
        if preempted:
            module.stop = Interrupted if interrupted else Preempted
            self.on_train_batch_end(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        is_best = self.metrics is not None and self.metrics.best == trainer.global_step
        if trainer.strategy.broadcast(is_best):
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        optimizer = trainer.optimizers[0]
        step = trainer.global_step
        content = {
            "schedule": {
                "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
                "lr": [group["lr"] for group in optimizer.param_groups],
            },
            "counts": module.counts,
            "bad_rows": sorted(module.bad_rows),
            **self.about,
        }
        if not (self.folder / checkpoint_name(step)).is_dir():
            log.info("Saving %s", checkpoint_name(step))
        if self.metrics:
            self.metrics.sync()
        reshard(module.vlm)
        save_checkpoint(self.folder, step, checkpoint_tensors(module.vlm, optimizer), content)
        self._prune()

    def _prune(self) -> None:
        if self.metrics:
            prune_checkpoints(self.folder, self.settings.keep_checkpoints, self.metrics.best)


def model_tensors(vlm: VLM) -> dict[str, Tensor]:
    """The trained parameters (tied ones once) and the persistent buffers.

    Frozen weights are left out: a resumed run reads them from their original files.
    """
    trained: dict[str, Tensor] = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    # Quantised layers also put their quantisation state, which belongs to frozen weights, into the state dict.
    known = {name for name, _ in vlm.named_buffers(remove_duplicate=False)}
    buffers = {
        name: tensor for name, tensor in vlm.state_dict().items() if name in known and not name.startswith("backbone.")
    }
    return trained | buffers


def checkpoint_tensors(vlm: VLM, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint, named `model.NAME` and `optimizer.KEY.NAME`."""
    names = {id(parameter): name for name, parameter in vlm.named_parameters()}
    tensors = {f"{MODEL}{name}": tensor for name, tensor in model_tensors(vlm).items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{OPTIMIZER}{key}.{names[id(parameter)]}"] = value
    return tensors


@torch.no_grad()
def restore_tensors(checkpoint: Checkpoint, vlm: VLM, optimizer: Optimizer) -> None:
    """Reads this process's part of a checkpoint into the model and its optimizer; `UsageError` if it does not fit."""
    for name, tensor in model_tensors(vlm).items():
        _fill(checkpoint, f"{MODEL}{name}", tensor)
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    for full_name in checkpoint.names(OPTIMIZER):
        key, _, name = full_name.removeprefix(OPTIMIZER).partition(".")
        parameter = trained[name]
        # State of the parameter's shape is sharded like the parameter; other state (AdamW's step) is a scalar.
        if checkpoint.shapes[full_name] == tuple(parameter.shape):
            tensor = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            _fill(checkpoint, full_name, tensor)
        else:
            tensor = checkpoint.read(full_name).to(parameter.device)  # where the fused kernel expects it
        optimizer.state[parameter][key] = tensor


def _fill(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    if checkpoint.shapes.get(name) != tuple(tensor.shape):
        found = checkpoint.shapes.get(name, "missing")
        raise UsageError(f"{checkpoint.folder} does not fit the model: {name} is {found}, not {tuple(tensor.shape)}.")
    piece = local_piece(tensor)
    if piece.tensor.numel():
        piece.tensor.copy_(checkpoint.read(name, piece.tensor.shape, piece.offset))
