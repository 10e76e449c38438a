"""The memory of a running check."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prism_deco.data.check_report import Totals
from prism_deco.data.validators import Fault


@dataclass(frozen=True)
class Result:
    """What came of a chunk. A fault of an image is noted once, with the first record that shows it."""

    start: int
    totals: Totals
    faults: list[Fault]

    def to_json(self) -> dict[str, Any]:
        return {"start": self.start, "totals": self.totals.to_json(), "faults": [asdict(f) for f in self.faults]}


class Journal:
    """The results so far, one per line, so that a check can go on after an interruption.

    Args:
        path: the file; removed by whoever is done with it.
        key: identifies the check; the results of another one are not used.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        self._key = key

    def read(self) -> dict[int, Result]:
        """Results without faults of the same check, by the start of their chunk; others are dropped."""
        done = {result.start: result for result in self._results() if not result.faults}
        with self.path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key}) + "\n")
            file.writelines(json.dumps(result.to_json()) + "\n" for result in done.values())
        return done

    def _results(self) -> Iterable[Result]:
        if not self.path.is_file():
            return
        header, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
        if header != json.dumps({"key": self._key}):
            return
        for line in lines:
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                return  # the last line of a check that was killed while writing it
            faults = [Fault(**fault) for fault in content["faults"]]
            yield Result(content["start"], Totals.from_json(content["totals"]), faults)

    def __enter__(self) -> Journal:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, result: Result) -> None:
        """Notes a result; it is on disk at once."""
        self._file.write(json.dumps(result.to_json()) + "\n")
        self._file.flush()
