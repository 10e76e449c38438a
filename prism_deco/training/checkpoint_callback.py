"""The callback that saves a run as it goes, and takes it up again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from prism_deco.errors import UsageError
from prism_deco.exits import Preempted
from prism_deco.training.checkpoint_state import (
    checkpoint_tensors,
    fast_forward,
    restore_scheduler,
    restore_tensors,
    scheduler_content,
)
from prism_deco.training.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_name,
    prune_checkpoints,
    save_checkpoint,
    step_of,
)
from prism_deco.training.metrics import VAL_LOSS, Metrics
from prism_deco.training.module import TrainingModule
from prism_deco.training.preemption import Preemption
from prism_deco.training.sharding import reshard

log = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves every `every` optimizer steps, at the end, and when the run has to make way; writes `metrics.jsonl`.

    Args:
        folder: the run's folder.
        resume: the checkpoint to go on from; None begins at the start.
        every: steps between checkpoints.
        keep: checkpoints that stay.
    """

    def __init__(self, folder: Path, resume: Path | None, *, every: int, keep: int, preemption: Preemption):
        if keep < 1 or every < 1:
            raise UsageError("trainer.keep_checkpoints must be at least 1, trainer.checkpoint_every above 0.")
        self._folder = folder
        self._resume = resume
        self._every = every
        self._keep = keep
        self._preemption = preemption
        self._metrics: Metrics | None = None
        self._best: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = step_of(self._resume) if self._resume else 0
        if self._resume:
            module, optimizer, scheduler = _parts(trainer, pl_module)
            checkpoint = Checkpoint(self._resume)
            restore_tensors(checkpoint, module.vlm, optimizer)
            restore_scheduler(checkpoint.content["schedule"], scheduler, optimizer)
            module.counts.update(checkpoint.content["counts"])
            fast_forward(trainer, start)
        if trainer.is_global_zero:
            self._metrics = Metrics(self._folder, start)
            self._best = self._metrics.best

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._preemption.claim()
        step = trainer.global_step
        known = bool(self._metrics and step in self._metrics.validated)
        if step and self._validates(trainer, step) and not trainer.strategy.broadcast(known):
            # The process was ended between this step and its validation.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        module, step = cast(TrainingModule, pl_module), trainer.global_step
        if self._metrics:
            self._metrics.append(step, module.last_step)
        if step % self._every == 0 or step == module.total_steps or module.making_way:
            self._save(trainer, module)
        if module.making_way:
            raise Preempted(f"made way after step {step} of {module.total_steps}", agreed=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        is_best = False
        if self._metrics:
            self._metrics.append(step, {VAL_LOSS: trainer.callback_metrics[VAL_LOSS].item()})
            is_best = self._metrics.best == step
        if trainer.strategy.broadcast(is_best):
            self._best = step
            self._save(trainer, cast(TrainingModule, pl_module))

    def _save(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:
        module, optimizer, scheduler = _parts(trainer, pl_module)
        reshard(module.vlm)
        step, folder = trainer.global_step, self._folder / CHECKPOINTS
        content = {"schedule": scheduler_content(scheduler, optimizer), "counts": module.counts}
        if not (folder / checkpoint_name(step)).is_dir():
            log.info("Saving %s", checkpoint_name(step))
        save_checkpoint(folder, step, checkpoint_tensors(module.vlm, optimizer), content)
        if trainer.is_global_zero:
            prune_checkpoints(folder, self._keep, self._best)

    def _validates(self, trainer: pl.Trainer, step: int) -> bool:
        return bool(trainer.limit_val_batches) and step % int(trainer.val_check_interval or 1) == 0


def _parts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[TrainingModule, Any, Any]:
    """The module, its optimizer and its schedule."""
    return cast(TrainingModule, pl_module), trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
