"""The loggers of a run, which show metrics, samples and hyperparameters: TensorBoard, and Lightning's other loggers."""

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
"""File in the run folder with the ids that loggers assigned to the run, so that a resumed run continues under them."""

LOGGERS: Registry[type[Logger]] = Registry("logger")
_ID_KEYS = {"id", "run_id", "experiment_key"}
"""Constructor parameters by which Lightning's loggers continue an earlier run."""
_SHOWN = (
    "num_tokens", "lm", "tower", "blind", "epochs", "global_batch_size",
    "lr", "projector_lr", "tower_lr", "weight_decay",
)  # fmt: skip
"""Keys of the recipe that loggers show as hyperparameters."""


@LOGGERS.register("tensorboard")
class Board(Logger):
    """Writes TensorBoard events synchronously.

    torch's `SummaryWriter` writes from a background thread: a kill loses what is queued there, and on a full disk only
    that thread sees the error.

    Args:
        run: the run's folder.
        start: optimizer steps already taken. TensorBoard drops earlier events of later steps: training repeats them.
    """

    # Positional-only: `Loggers` passes these. Parameters that can be named are options of `trainer.loggers`.
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
        for name, value in metrics.items():
            self._write(step=step, summary=summary.scalar(name, value))

    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        """Logs images, uint8[H, W, 3] each."""
        for pixels in images:
            self._write(step=step, summary=summary.image(key, pixels, dataformats="HWC"))

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        """Logs the rows of a table as Markdown."""
        for row in data:
            named = zip(columns, row, strict=True)
            text = "\n\n".join(f"**{column}** {value}" for column, value in named)
            self._write(step=step, summary=summary.text(key, text))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Fills the HPARAMS tab, where TensorBoard shows hyperparameters next to the last value of every scalar."""
        # The first part lists the metrics, and TensorBoard takes that list from only one of several runs: the scores of
        # the others would be missing. Without it, TensorBoard collects the scalars of all runs, also of evaluations.
        _, start, end = summary.hparams(dict(params), {})
        self._write(step=0, summary=start)
        self._write(step=0, summary=end)

    def finalize(self, status: str) -> None:
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


for _class in lightning_loggers.__all__:
    _name = _class.removesuffix("Logger").lower()
    if _name and _name != FOLDER:
        LOGGERS.register(_name)(getattr(lightning_loggers, _class))


def read_loggers(trainer: DictConfig) -> dict[str, dict[str, Any]]:
    """The options of each logger in `trainer.loggers`; `UsageError` if a logger or one of its options is unusable."""
    chosen: dict[str, dict[str, Any]] = {}
    entries: Any = OmegaConf.to_container(trainer.loggers, resolve=True)
    for entry in entries:
        named = {entry: None} if isinstance(entry, str) else entry
        if not isinstance(named, dict) or not all(isinstance(given, dict | None) for given in named.values()):
            raise UsageError(f"trainer.loggers: {entry!r} is not a logger. Write NAME, or {{NAME: {{OPTION: VALUE}}}}.")
        for name, given in named.items():
            kind = LOGGERS.get(str(name))
            options = given or {}
            if name in chosen:
                raise UsageError(f"trainer.loggers: {name} is named twice. A run has at most one logger of each kind.")
            # Lightning's logger modules declare the packages they need as global `RequirementCache` objects.
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
    """`UsageError` if the value of an option has the wrong type, or names a folder that is not writable."""
    option = f"trainer.loggers: {name}: {parameter.name}={value!r}"
    kind = parameter.annotation
    try:
        fits = kind is inspect.Parameter.empty or isinstance(value, (kind, int) if kind is float else kind)
    except TypeError:  # a type that isinstance does not accept, such as list[str] or Literal
        fits = True
    if not fits:
        raise UsageError(f"{option} must be of the type {inspect.formatannotation(kind)}.")
    if parameter.name.endswith("every_n_steps") and isinstance(value, int) and value < 1:
        raise UsageError(f"{option} must be a whole number above 0.")
    if parameter.name == "save_dir" and isinstance(value, str | Path):
        check_writable(Path(value), f"Name another folder in trainer.loggers, or leave out {name}'s save_dir.")


class Loggers:
    """Logs to all loggers of a run. Only rank 0 has one.

    Args:
        run: the run's folder.
        start: optimizer steps already taken. If above 0, loggers that support it continue the earlier run.
    """

    def __init__(self, run: Path, config: DictConfig, start: int):
        recipe = config.recipe
        parts = {part: config[part].name for part in ("backbone", "projector", "llm", "data", "recipe")}
        # TensorBoard does not accept None.
        chosen = {key: "" if recipe[key] is None else recipe[key] for key in _SHOWN}
        choices = parts | chosen | {"image_size": config.backbone.image_size or "", "seed": config.seed}
        ids = read_json(run / IDS) if start and (run / IDS).is_file() else {}
        self._loggers: list[Logger] = []
        for name, options in read_loggers(config.trainer).items():
            kind = LOGGERS.get(name)
            # Lightning's loggers name the same argument differently: each gets those that its constructor has.
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
            if known.keys() & _ID_KEYS:
                ids[name] = logger.version
                write_json(run / IDS, ids)

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Logs scalars; the key of a nested one, as in `{"lr": {"lm": 1}}`, becomes `lr/lm`."""
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
        for logger in self._loggers:
            logger.log_metrics(flat, step)
            logger.save()  # a kill loses what a logger buffers

    def sample(self, name: str, pixels: np.ndarray, text: Mapping[str, str], step: int) -> None:
        """Logs an image, uint8[H, W, 3], and texts about it, to loggers with `log_image` and `log_text`."""
        for logger in self._loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(name, [pixels], step=step)  # type: ignore[attr-defined]
            if hasattr(logger, "log_text"):
                # Under another name than the image: some loggers accept one type of value per name.
                logger.log_text(f"{name}_text", list(text), [list(text.values())], step=step)  # type: ignore[attr-defined]

    def close(self, status: str) -> None:
        """Closes all loggers; `status` is `success` or `failed`."""
        for logger in self._loggers:
            logger.finalize(status)
            # wandb would otherwise log the next run of this process into this one.
            finish = getattr(getattr(logger, "experiment", None), "finish", None)
            if finish is not None:
                finish()
