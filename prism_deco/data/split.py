"""The held-out split: by image, so that no image is on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prism_deco.data.base import Source
from prism_deco.data.records import Record, RecordTable, open_records, refusal
from prism_deco.errors import UsageError


class Subset(RecordTable):
    """Some of the records of a table.

    Args:
        indices: int[n], rows of the table in the order of this one.
    """

    def __init__(self, records: RecordTable, indices: np.ndarray):
        self._records = records
        self._indices = indices
        self.data_hash = records.data_hash
        self.embedded = records.embedded

    def column(self, name: str) -> np.ndarray:
        return self._records.column(name)[self._indices]

    def record(self, index: int) -> Record:
        return self._records.record(int(self._indices[index]))

    def __len__(self) -> int:
        return len(self._indices)


def hold_out(records: RecordTable, fraction: float) -> tuple[Subset, Subset]:
    """Splits records into (train, validation).

    A record is held out if the hash of its image falls below `fraction`, whatever the seed and the order: it never
    changes sides, and no image is on both.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"data.val_fraction={fraction} must be at least 0 and below 1.")
    held = np.asarray(records.column("position")) < fraction
    return Subset(records, np.flatnonzero(~held)), Subset(records, np.flatnonzero(held))


def first(records: RecordTable, limit: int | None) -> Subset:
    """The first `limit` records; all of them for None."""
    if limit is not None and limit < 1:
        raise UsageError(f"data.limit={limit} must be at least 1.")
    return Subset(records, np.arange(len(records))[:limit])


@dataclass(frozen=True)
class Parts:
    """The records of a run.

    Attributes:
        records, val_records: all usable records of the files; the same object if a part of it is held out.
        train, val: what is trained on, and what is validated on.
        left_out: what is wrong with each refused record of both files.
    """

    records: RecordTable
    val_records: RecordTable
    train: Subset
    val: Subset
    left_out: list[str]


def open_parts(
    source: Source,
    cache: Path,
    *,
    val_fraction: float,
    limit: int | None,
    on_bad_record: str = "fail",
    odd_records: str = "refuse",
) -> Parts:
    """The records of a source, divided into those to train on and those to validate on.

    Args:
        cache: see `open_records`.
        val_fraction: fraction of the images to hold out if the source has no validation records.
        limit: train on the first records only; None trains on all.
        on_bad_record: fail | skip.
        odd_records: refuse | train, see `recipe.odd_records`.

    Raises:
        UsageError: a file cannot be read, a record is refused and `on_bad_record` is "fail", or none is left to train
            on.
    """
    left_out: list[str] = []

    def read(path: Path) -> RecordTable:
        records = open_records(path, cache, image_root=source.image_root, allow_faults=True)
        refused = records.refused(odd_records)
        if refused and on_bad_record == "fail":
            raise refusal(path, refused)
        left_out.extend({fault["entry"]: fault["detail"] for fault in refused}.values())
        if odd_records == "train" or not refused:
            return records
        return Subset(records, np.flatnonzero(~records.column("odd")))

    records = read(source.train)
    if source.val is not None:
        val_records = read(source.val)
        train = first(records, None)
        val = first(val_records, None)
    else:
        val_records = records
        train, val = hold_out(records, val_fraction)
    if len(train) == 0:
        all_held = source.val is None and len(val) > 0
        hint = f", and all are held out: lower data.val_fraction={val_fraction:g}" if all_held else ""
        raise UsageError(f"There is nothing to train on: {source.train} has {len(records)} usable records{hint}.")
    return Parts(records, val_records, first(train, limit), val, left_out)
