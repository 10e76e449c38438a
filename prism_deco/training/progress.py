"""Progress of a run on disk: `status.json`, whose state is running | preempted | failed | out_of_memory | trained |
done, and `metrics.jsonl`, the exact metrics of every step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prism_deco.exits import slurm_job
from prism_deco.files import write_json, write_whole

METRICS = "metrics.jsonl"
VAL_LOSS = "val/loss"

THROUGH = ("trained", "done")
"""States of a run whose training has finished; a `trained` one is not scored yet."""

_STATUS = "status.json"


def set_status(folder: Path, state: str, **details: object) -> None:
    """Writes `status.json`."""
    content = {"state": state, **details}
    if job := slurm_job():
        content |= {"job": job, "restarts": _restarts()}
    path = folder / _STATUS
    try:
        write_json(path, content)
    except OSError:
        if not path.is_file():
            raise
        # A full disk has no room for a second file, but the block of the existing one can be overwritten.
        with path.open("r+", encoding="utf-8") as file:
            file.write(json.dumps(content))
            file.truncate()


def read_status(folder: Path) -> dict[str, Any]:
    """The content of `status.json`; empty if it is missing or unreadable."""
    try:
        status = json.loads((folder / _STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def is_requeued(folder: Path) -> bool:
    """Whether this process belongs to a requeued SLURM job that started the run before it was requeued."""
    status = read_status(folder)
    job = slurm_job()
    was_requeued = status.get("requeued", False) or _restarts() > status.get("restarts", 0)
    return job is not None and status.get("job") == job and was_requeued


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


class Metrics:
    """Appends one line of JSON per step and per validation to `metrics.jsonl`. Floats are written without rounding.

    Args:
        folder: the run's folder.
        start: step from which training resumes. Later lines are removed, since training repeats those steps.
    """

    def __init__(self, folder: Path, start: int):
        self._path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= start] if start else []
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self.validated = {row["step"]: row[VAL_LOSS] for row in kept if VAL_LOSS in row}

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if VAL_LOSS in values:
            self.validated[step] = values[VAL_LOSS]

    def sync(self) -> None:
        """Flushes the lines to disk: call this before saving a checkpoint, which must not survive a crash without
        them."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())

    @property
    def best(self) -> int | None:
        """The first step with the lowest validation loss; None before the first validation."""
        return min(self.validated, key=lambda step: (self.validated[step], step), default=None)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, without a last line that a kill cut off."""
    rows = []
    with suppress(FileNotFoundError):
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows
