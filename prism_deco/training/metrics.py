"""`metrics.jsonl`: every step's numbers, exact, and never twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prism_deco.files import write_whole

METRICS = "metrics.jsonl"
VAL_LOSS = "val/loss"


class Metrics:
    """Appends a line of JSON per step and per validation, under the names that TensorBoard shows.

    Floats are written so that reading gives the same bits.

    Args:
        folder: the run's folder.
        step: where training goes on: lines of later steps, which will come again, are removed.
    """

    def __init__(self, folder: Path, step: int):
        self._path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self.validated = {row["step"]: row[VAL_LOSS] for row in kept if VAL_LOSS in row}

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if VAL_LOSS in values:
            self.validated[step] = values[VAL_LOSS]

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss, the first of equals."""
        return min(self.validated, key=lambda step: (self.validated[step], step), default=None)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run; a last line that was cut off by a kill is left out."""
    rows = []
    with suppress(FileNotFoundError):
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows
