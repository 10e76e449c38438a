"""The callback that saves a run as it goes, and restores it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from prism_deco.exits import Interrupted
from prism_deco.training.checkpoint_state import (
    checkpoint_tensors,
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
)
from prism_deco.training.lightning_internals import run_validation, set_position
from prism_deco.training.metrics import Metrics
from prism_deco.training.module import TrainingModule
from prism_deco.training.preemption import Preemption
from prism_deco.training.sharding import reshard

log = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves every `every` optimizer steps, after the best validation, at the end, and when the run is asked to stop.

    Args:
        folder: the run's folder.
        resume: the checkpoint to continue from; None begins at the start.
        metrics: what was recorded so far; None in all processes but the first.
        every: steps between checkpoints.
        keep: checkpoints that stay, beside the one of the lowest validation loss.
        about: what the checkpoints say of the run that they belong to.
    """

    def __init__(
        self,
        folder: Path,
        resume: Checkpoint | None,
        metrics: Metrics | None,
        *,
        every: int,
        keep: int,
        about: Mapping[str, Any],
        preemption: Preemption,
    ):
        self._folder = folder / CHECKPOINTS
        self._resume = resume
        self._metrics = metrics
        self._every = every
        self._keep = keep
        self._about = about
        self._preemption = preemption
        self._best = metrics.best if metrics else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._resume is None:
            return
        module, optimizer, scheduler = _parts(trainer, pl_module)
        step = self._resume.step
        restore_tensors(self._resume, module.vlm, optimizer)
        restore_scheduler(self._resume.content["schedule"], scheduler, optimizer)
        module.counts.update(self._resume.content["counts"])
        set_position(trainer, step)
        # The process may have ended between this step and its validation. Not later than here: after the last step
        # Lightning has nothing to train, and calls no other hook.
        validates = trainer.limit_val_batches and step % int(trainer.val_check_interval or 1) == 0
        missing = self._metrics is not None and step not in self._metrics.validated
        if validates and trainer.strategy.broadcast(missing):
            run_validation(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._preemption.claim()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        module, step = cast(TrainingModule, pl_module), trainer.global_step
        if step % self._every == 0 or step == module.total_steps or module.stop:
            self._save(trainer, module)
        if module.stop:
            happened = "interrupted" if module.stop is Interrupted else "preempted"
            reason = f"{happened} after step {step} of {module.total_steps}"
            raise module.stop(reason, agreed=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        is_best = self._metrics is not None and self._metrics.best == step
        if trainer.strategy.broadcast(is_best):
            self._best = step
            self._save(trainer, cast(TrainingModule, pl_module))

    def _save(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:
        module, optimizer, scheduler = _parts(trainer, pl_module)
        reshard(module.vlm)
        step = trainer.global_step
        content = {"schedule": scheduler_content(scheduler, optimizer), "counts": module.counts, **self._about}
        if not (self._folder / checkpoint_name(step)).is_dir():
            log.info("Saving %s", checkpoint_name(step))
        if self._metrics:
            self._metrics.sync()
        save_checkpoint(self._folder, step, checkpoint_tensors(module.vlm, optimizer), content)
        if self._metrics:
            prune_checkpoints(self._folder, self._keep, self._best)


def _parts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[TrainingModule, Any, Any]:
    """The module, its optimizer and its schedule."""
    return cast(TrainingModule, pl_module), trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
