"""Where a run's numbers, samples and choices are shown: TensorBoard's files, and any other logger of Lightning."""

from __future__ import annotations

import inspect
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import loggers as lightning_loggers
from pytorch_lightning.loggers import Logger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # generated code
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from prism_deco.config.registry import Registry
from prism_deco.errors import UsageError
from prism_deco.files import check_writable, read_json, write_json

FOLDER = "tensorboard"
IDS = "loggers.json"
"""The file of a run that holds the ids under which loggers know it, by which a resumed run continues there."""

LOGGERS: Registry[type[Logger]] = Registry("logger")
_ID_KEYS = ("id", "run_id", "experiment_key")
"""What Lightning's loggers call the id of an earlier run."""


@LOGGERS.register("tensorboard")
class Board(Logger):
    """Writes TensorBoard's events as they come.

    torch's `SummaryWriter` writes from a thread of its own: what waits there is lost in a kill, and a full disk ends
    in the thread's traceback.

    Args:
        run: the run's folder.
        start: optimizer steps already taken. Events of later steps are hidden, since training repeats them.
    """

    # Positional arguments are the run's: those with names are options.
    def __init__(self, run: Path, start: int, /):
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

    @property
    def name(self) -> str:
        return FOLDER

    @property
    def version(self) -> None:
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Plots numbers."""
        for name, value in metrics.items():
            self._write(step=step, summary=summary.scalar(name, value))

    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        """Shows images, uint8[H, W, 3]."""
        for pixels in images:
            self._write(step=step, summary=summary.image(key, pixels, dataformats="HWC"))

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        """Shows the rows of a table as Markdown."""
        for row in data:
            named = zip(columns, row, strict=True)
            text = "\n\n".join(f"**{column}** {value}" for column, value in named)
            self._write(step=step, summary=summary.text(key, text))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Fills the HPARAMS tab; TensorBoard shows the last value of every scalar next to the choices."""
        # Of several runs, TensorBoard takes the list of metrics (the first part) from any one: the scores of all others
        # would be missing. Without a list it collects the scalars of all runs, those of a later evaluation included.
        _, start, end = summary.hparams(dict(params), {})
        self._write(step=0, summary=start)
        self._write(step=0, summary=end)

    def finalize(self, status: str) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


for _class in lightning_loggers.__all__:
    _name = _class.removesuffix("Logger").lower()
    if _name and _name != FOLDER:
        LOGGERS.register(_name)(getattr(lightning_loggers, _class))


def read_loggers(trainer: DictConfig) -> dict[str, dict[str, Any]]:
    """The options of each logger that `trainer.loggers` names.

    Raises:
        UsageError: a name, an option or the type of its value is wrong, a logger is named twice, its folder cannot be
            written, or its package is not installed.
    """
    chosen: dict[str, dict[str, Any]] = {}
    entries: Any = OmegaConf.to_container(trainer.loggers, resolve=True)
    for entry in entries:
        named = {entry: None} if isinstance(entry, str) else entry
        if not isinstance(named, dict) or not all(isinstance(given, dict | None) for given in named.values()):
            raise UsageError(f"trainer.loggers: {entry!r} is no logger. Write NAME, or {{NAME: {{OPTION: VALUE}}}}.")
        for name, given in named.items():
            kind, options = LOGGERS.get(str(name)), given or {}
            if name in chosen:
                raise UsageError(f"trainer.loggers: {name} is named twice. A run has one logger of a kind.")
            # Lightning's modules hold what they need as `RequirementCache`.
            needed = [value for value in vars(sys.modules[kind.__module__]).values() if hasattr(value, "requirement")]
            if needed and not any(needed):
                raise UsageError(f"trainer.loggers: {name} is not installed: pip install '{needed[0].requirement}'.")
            signature = inspect.signature(kind)
            known = [p for p in signature.parameters.values() if p.kind is not p.POSITIONAL_ONLY]
            try:
                signature.replace(parameters=known).bind_partial(**options)
            except TypeError as error:
                raise UsageError(f"trainer.loggers: {name} {error}.") from error
            for parameter in known:
                if parameter.name in options:
                    _check_option(str(name), parameter, options[parameter.name])
            chosen[str(name)] = options
    return chosen


def _check_option(name: str, parameter: inspect.Parameter, value: Any) -> None:
    """`UsageError` where a logger's option has a value of another type, or is a folder that cannot be written."""
    option = f"trainer.loggers: {name}: {parameter.name}={value!r}"
    kind = parameter.annotation
    try:
        fits = kind is inspect.Parameter.empty or isinstance(value, (kind, int) if kind is float else kind)
    except TypeError:  # a type that cannot be asked, such as list[str] or Literal
        fits = True
    if not fits:
        raise UsageError(f"{option} must be of the type {inspect.formatannotation(kind)}.")
    if parameter.name.endswith("every_n_steps") and isinstance(value, int) and value < 1:
        raise UsageError(f"{option} must be a whole number above 0.")
    if parameter.name == "save_dir" and isinstance(value, str | Path):
        check_writable(Path(value), f"Name another folder in trainer.loggers, or leave out {name}'s save_dir.")


class Loggers:
    """The loggers of a run, as one. The first process has them.

    Args:
        run: the run's folder.
        start: optimizer steps already taken; a logger that can continues the run that it knows.

    Raises:
        UsageError: see `read_loggers`.
    """

    def __init__(self, run: Path, config: DictConfig, start: int):
        recipe = config.recipe
        parts = {part: config[part].name for part in ("backbone", "projector", "llm", "data", "recipe")}
        keys = (
            *("num_tokens", "lm", "tower", "blind", "epochs", "global_batch_size"),
            *("lr", "projector_lr", "tower_lr", "weight_decay"),
        )
        # TensorBoard has no empty values.
        chosen = {key: "" if recipe[key] is None else recipe[key] for key in keys}
        choices = parts | chosen | {"image_size": config.backbone.image_size or "", "seed": config.seed}
        ids = read_json(run / IDS) if start and (run / IDS).is_file() else {}
        self._loggers: list[Logger] = []
        for name, options in read_loggers(config.trainer).items():
            kind = LOGGERS.get(name)
            given: dict[str, Any] = {"name": config.run_id, "run_name": config.run_id}
            given |= {"save_dir": str(run / name), **dict.fromkeys(_ID_KEYS, ids.get(name))}
            parameters = inspect.signature(kind).parameters
            known = {key: value for key, value in given.items() if key in parameters}
            of_run = (run, start) if any(p.kind is p.POSITIONAL_ONLY for p in parameters.values()) else ()
            if "save_dir" in known:
                (run / name).mkdir(exist_ok=True)
            logger = kind(*of_run, **known | options)
            logger.log_hyperparams(choices)
            self._loggers.append(logger)
            if known.keys() & {*_ID_KEYS}:
                ids[name] = logger.version
                write_json(run / IDS, ids)

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Logs numbers; `{"lr": {"lm": 1}}` becomes `lr/lm`."""
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
        for logger in self._loggers:
            logger.log_metrics(flat, step)
            logger.save()  # what waits in memory is lost in a kill

    def sample(self, name: str, pixels: np.ndarray, text: Mapping[str, str], step: int) -> None:
        """Shows an image, uint8[H, W, 3], and texts about it, where a logger has `log_image` and `log_text`."""
        for logger in self._loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(name, [pixels], step=step)  # type: ignore[attr-defined]
            if hasattr(logger, "log_text"):
                # Not under the image's name, where a logger has one kind of value per name.
                logger.log_text(f"{name}_text", list(text), [list(text.values())], step=step)  # type: ignore[attr-defined]

    def close(self, status: str) -> None:
        """Ends all of them: `success` or `failed`."""
        for logger in self._loggers:
            logger.finalize(status)
            # Or the next run of this process would continue in it (wandb).
            finish = getattr(getattr(logger, "experiment", None), "finish", None)
            if finish is not None:
                finish()
