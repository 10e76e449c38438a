"""All uses of Lightning beyond its public interface.

`tests/training/test_lightning_internals.py` checks each function against the installed version, and `pyproject.toml`
bounds that version.
"""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


def set_position(trainer: pl.Trainer, step: int) -> None:
    """Sets the counters of steps and batches to `step`; call this before loaders are built."""
    loop = trainer.fit_loop.epoch_loop
    steps, batches = loop.manual_optimization.optim_step_progress.total, loop.batch_progress.total
    steps.ready = steps.completed = step
    batches.ready = batches.completed = step
    batches.started = batches.processed = step  # type: ignore[attr-defined]  # attributes of a subclass


def count_skipped_step(trainer: pl.Trainer) -> None:
    """Counts a skipped optimizer step, since Lightning counts calls of `optimizer.step`."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def run_validation(trainer: pl.Trainer) -> None:
    """Runs a validation before training; Lightning itself does so only between two steps."""
    stage = trainer.state.stage
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.state.stage = stage


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Trains. Raises the error that ended the training, even if Lightning raises another one during cleanup."""
    first = FirstError()
    trainer.callbacks.insert(0, first)  # type: ignore[attr-defined]
    try:
        trainer.fit(module, datamodule=data)
    except BaseException as error:
        raise first.error or error from None


class FirstError(Callback):
    """Keeps the first error."""

    error: BaseException | None = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.error = self.error or exception
