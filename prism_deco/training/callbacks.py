"""Callbacks that report on a run while it trains: progress, metrics, speed, and sample answers."""

from __future__ import annotations

import logging
import resource
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic, perf_counter
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prism_deco.data.images import load_image
from prism_deco.data.loader import Step, stack_pixels
from prism_deco.data.records import Records
from prism_deco.inference import answer
from prism_deco.llms import LanguageModel
from prism_deco.llms.prompts import IMAGE_TAG
from prism_deco.logs import log_console
from prism_deco.plan.devices import GIB, peak_flops
from prism_deco.plan.flops import TrainingFlops
from prism_deco.training.board import Loggers
from prism_deco.training.datamodule import Conversations
from prism_deco.training.progress import VAL_LOSS, Metrics
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

LOG_SECONDS = 120.0
"""Seconds between two log lines; a run of a week logs five thousand."""

MAX_NEW_TOKENS = 32
"""Length limit of a sample answer, in tokens."""


@dataclass(eq=False)
class Recorder(Callback):
    """Records the metrics of each step and validation, and shows progress. Only rank 0 has one.

    `metrics.jsonl` gets every step, the loggers every `log_every`-th step under the same names. On a terminal, a bar
    counts optimizer steps; the log gets a line every two minutes. The bar shares the log's console: two consoles on
    one terminal would overwrite each other's lines.
    """

    metrics: Metrics
    loggers: Loggers
    log_every: int
    _bar: Progress | None = field(default=None, init=False)
    _first_step: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)
    _logged: float = field(default=0.0, init=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        self._started = self._logged = monotonic()
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
            )
            self._bar = Progress(*columns, console=log_console())
            self._bar.add_task("Training", completed=self._first_step, total=pl_module.total_steps, loss="")
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        step, total, loss = trainer.global_step, pl_module.total_steps, pl_module.last_step["train/loss"]
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, loss=f"loss {loss:.4f}")
        now = monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            seconds = (now - self._started) / (step - self._first_step)
            left = timedelta(seconds=round(seconds * (total - step)))
            log.info("Step %d of %d: loss %.4f, %.2f s per step, %s left", step, total, loss, seconds, left)
        if step % self.log_every == 0:
            counts = {f"train/{name}": count for name, count in pl_module.counts.items() if count}
            self.loggers.scalars(pl_module.last_step | pl_module.last_norms | counts, step)
        self.metrics.append(step, pl_module.last_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        log.info("Step %d of %d: val/loss %.4f", trainer.global_step, pl_module.total_steps, pl_module.val_loss)
        # metrics.jsonl comes last: a resumed run does not repeat a validation that is recorded there.
        self.loggers.scalars({VAL_LOSS: pl_module.val_loss}, trainer.global_step)
        self.metrics.append(trainer.global_step, {VAL_LOSS: pl_module.val_loss})

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any, status: str = "success") -> None:
        if self._bar:
            self._bar.stop()
        self.loggers.close(status)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module, "failed")


class SampleAnswers(Callback):
    """Logs a few validation images after each validation, with question, model answer and reference answer.

    Args:
        count: number of images. The first ones of the validation records are shown, each with its first record.
        loggers: None on all ranks but 0.
    """

    def __init__(self, llm: LanguageModel, data: Conversations, count: int, loggers: Loggers | None):
        self._llm = llm
        self._data = data
        self._count = count
        self._loggers = loggers

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        vlm: VLM = pl_module.vlm
        # With sharded weights all ranks must generate together, although only rank 0 logs the answers.
        if self._loggers is None and not vlm.every_unit:
            return
        records, examples = self._data.val_records, self._data.val_examples
        for row, index in enumerate(_distinct_images(records, self._count)):
            record, example = records[index], examples[index]
            if example.bad_images or example.bad_record:
                continue
            pixels = stack_pixels(example.pixels)
            assert pixels is not None
            pixels = {tower: images.to(pl_module.device) for tower, images in pixels.items()}
            question, reference = [m["content"] for m in record.messages if m["role"] != "system"][:2]
            with trainer.precision_plugin.forward_context():
                visual = list(vlm.visual_tokens(pixels))
                [text] = answer(vlm, self._llm, [visual], [question], max_new_tokens=MAX_NEW_TOKENS)
            if self._loggers:
                image = np.asarray(load_image(examples.images, record.images[0]))
                shown = question.replace(IMAGE_TAG, "").strip()
                texts = {"question": shown, "answer": text, "reference": reference}
                self._loggers.sample(f"val/sample_{row}", image, texts, trainer.global_step)


@dataclass(eq=False)
class SpeedMonitor(Callback):
    """Logs the following every `log_every` optimizer steps, averaged over these steps and summed over devices:

    - `train/samples_per_s`, `train/tokens_per_s` (positions of the LLM without padding) and
      `train/supervised_tokens_per_s`;
    - `train/mfu`: model FLOPs utilisation, on devices whose peak is known;
    - `train/data_wait`: fraction of the time spent waiting for the loader (rank 0);
    - `train/memory_gib`: peak memory since the start, of the tensors on a GPU, otherwise of the process (rank 0).

    Validation time is excluded.

    Attributes:
        flops: costs of the model (`plan.flops.training_flops`); None leaves out the utilisation.
        loggers: None on all ranks but 0.
    """

    flops: TrainingFlops | None
    log_every: int
    loggers: Loggers | None
    # A resumed run may validate before it starts to train.
    _start: float = field(default=0.0, init=False)
    _last_end: float = field(default=0.0, init=False)
    _paused: float = field(default=0.0, init=False)
    _waited: float = field(default=0.0, init=False)
    _counts: torch.Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64), init=False)
    """Records, images, positions, squared lengths and targets."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to measure `log_every` steps."""
        self._start = self._last_end = perf_counter()
        self._waited = 0.0
        self._counts = torch.zeros_like(self._counts)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        images = sum(len(next(iter(passed.pixels.values()))) for passed in batch.batches if passed.pixels)
        pairs = sum(length**2 for length in batch.lengths)
        counts = [batch.records, images, sum(batch.lengths), pairs, batch.num_targets]
        self._counts += torch.tensor(counts, dtype=torch.float64)
        if trainer.global_step % self.log_every == 0:
            self._log(trainer, pl_module.device)
            self.on_train_start(trainer, pl_module)
        self._last_end = perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pause = perf_counter() - self._paused
        self._start += pause
        self._last_end += pause

    def _log(self, trainer: pl.Trainer, device: torch.device) -> None:
        seconds = max(perf_counter() - self._start, 1e-9)
        total: Any = trainer.strategy.reduce(self._counts.to(device), reduce_op="sum")
        records, images, positions, pairs, targets = total.tolist()
        values = {
            "train/samples_per_s": records / seconds,
            "train/tokens_per_s": positions / seconds,
            "train/supervised_tokens_per_s": targets / seconds,
            "train/data_wait": self._waited / seconds,
            "train/memory_gib": _memory(device) / GIB,
        }
        peak = peak_flops(device)
        if peak is not None and self.flops is not None:
            done = self.flops.step(images=images, positions=positions, pairs=pairs, targets=targets)
            values["train/mfu"] = done / (seconds * peak * trainer.world_size)
        if self.loggers:
            self.loggers.scalars(values, trainer.global_step)


def _distinct_images(records: Records, count: int) -> list[int]:
    """The first records of the first `count` images."""
    chosen: dict[tuple[str, ...], int] = {}
    for index in np.flatnonzero(records.has_image).tolist():
        chosen.setdefault(records[index].images, index)
        if len(chosen) >= count:
            break
    return list(chosen.values())[:count]


def _memory(device: torch.device) -> int:
    """Peak memory in bytes, of the tensors on a GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
