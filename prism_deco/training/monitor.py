"""How fast a run is, what it waits for and how much memory it takes."""

from __future__ import annotations

import resource
import sys
from time import perf_counter
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from prism_deco.data.loader import Step
from prism_deco.plan.devices import GIB, peak_flops
from prism_deco.plan.flops import TrainingFlops
from prism_deco.training.board import Board


class SpeedMonitor(Callback):
    """Plots, every `log_every` optimizer steps, means since the last time over all devices:

    - `train/samples_per_s`, `train/tokens_per_s` (positions of the LLM without padding) and
      `train/supervised_tokens_per_s`;
    - `train/mfu`: fraction of the devices' peak that the model's arithmetic reaches, on devices of a known peak;
    - `train/data_wait`: fraction of the time in which a step waited for the loader;
    - `train/memory_gib`: peak since the start, of tensors on a GPU, else of the process; of the first device.

    Validation counts for none of them.

    Args:
        flops: costs of the model (`plan.flops.training_flops`); None leaves the utilisation out.
        log_every: optimizer steps.
        board: where they are plotted; None in all processes but the first.
    """

    def __init__(self, flops: TrainingFlops | None, log_every: int, board: Board | None):
        self._flops = flops
        self._log_every = log_every
        self._board = board
        self._start = self._last_end = self._paused = 0.0
        self._waited = 0.0
        self._counts: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        counts = _counts(cast(Step, batch), pl_module.device)
        self._counts = counts if self._counts is None else self._counts + counts
        if trainer.global_step % self._log_every == 0:
            self._log(trainer, pl_module.device)
            self._restart()
        self._last_end = perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pause = perf_counter() - self._paused
        self._start += pause
        self._last_end += pause

    def _restart(self) -> None:
        self._start = self._last_end = perf_counter()
        self._waited, self._counts = 0.0, None

    def _log(self, trainer: pl.Trainer, device: torch.device) -> None:
        assert self._counts is not None
        seconds = max(perf_counter() - self._start, 1e-9)
        total = cast(Tensor, trainer.strategy.reduce(self._counts, reduce_op="sum"))
        records, images, positions, pairs, targets = total.tolist()
        values = {
            "train/samples_per_s": records / seconds,
            "train/tokens_per_s": positions / seconds,
            "train/supervised_tokens_per_s": targets / seconds,
            "train/data_wait": self._waited / seconds,
            "train/memory_gib": _memory(device) / GIB,
        }
        peak = peak_flops(device)
        if peak is not None and self._flops is not None:
            done = self._flops.step(images=images, positions=positions, pairs=pairs, targets=targets)
            values["train/mfu"] = done / (seconds * peak * trainer.world_size)
        if self._board:
            self._board.scalars(values, trainer.global_step)


def _counts(step: Step, device: torch.device) -> Tensor:
    """float64[5]: records, images, positions, squared lengths, supervised positions of a step on this device."""
    images = targets = 0
    lengths: list[int] = []
    for batch in step.batches:
        images += len(next(iter(batch.pixels.values()))) if batch.pixels else 0
        targets += int((batch.labels[:, 1:] >= 0).sum())
        lengths += batch.attention_mask.sum(dim=1).tolist() if batch.lengths is None else batch.lengths
    counts = [step.records, images, sum(lengths), sum(length**2 for length in lengths), targets]
    return torch.tensor(counts, dtype=torch.float64, device=device)


def _memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
