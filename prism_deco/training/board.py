"""TensorBoard's files of a run."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # generated code
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

FOLDER = "tensorboard"


class Board:
    """Writes events as they come.

    torch's `SummaryWriter` writes from a thread of its own: what waits there is lost in a kill, and a full disk ends
    in the thread's traceback.

    Args:
        run: the run's folder.
        start: optimizer steps already taken. Events of later steps are hidden, since training repeats them.
    """

    def __init__(self, run: Path, start: int):
        folder = run / FOLDER
        if not start:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if start:
            self._write(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Plots numbers; `{"lr": {"lm": 1}}` is shown as `lr/lm`."""
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.scalars({f"{name}/{key}": number for key, number in value.items()}, step)
            else:
                self._write(step=step, summary=summary.scalar(name, value))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Shows an image, uint8[H, W, 3]."""
        self._write(step=step, summary=summary.image(name, pixels, dataformats="HWC"))

    def text(self, name: str, markdown: str, step: int) -> None:
        """Shows a text."""
        self._write(step=step, summary=summary.text(name, markdown))

    def hyperparameters(self, choices: Mapping[str, Any]) -> None:
        """Fills the HPARAMS tab; TensorBoard shows the last value of every scalar next to the choices."""
        # Of several runs, TensorBoard takes the list of metrics (the first part) from any one: the scores of all others
        # would be missing. Without a list it collects the scalars of all runs, those of a later evaluation included.
        _, start, end = summary.hparams(dict(choices), {})
        self._write(step=0, summary=start)
        self._write(step=0, summary=end)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def choices_of(config: DictConfig) -> dict[str, Any]:
    """The main choices of a run, flat."""
    recipe = config.recipe
    names = {part: config[part].name for part in ("backbone", "projector", "llm", "data", "recipe")}
    keys = ("num_tokens", "lm", "blind", "epochs", "global_batch_size", "lr", "projector_lr", "weight_decay")
    # TensorBoard has no empty values.
    chosen = {key: "" if recipe[key] is None else recipe[key] for key in keys}
    return names | chosen | {"image_size": config.backbone.image_size or "", "seed": config.seed}
