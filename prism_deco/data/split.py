"""The held-out split: by image, so that no image is on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.data.base import Source
from prism_deco.data.records import Record, Records, open_records, refusal
from prism_deco.errors import UsageError


class Subset(Sequence[Record]):
    """Some records of a file, in the given order; stands wherever `Records` does."""

    def __init__(self, records: Records | Subset, indices: np.ndarray):
        self._records = records
        self._indices = indices
        self.data_hash = records.data_hash
        self.embedded = records.embedded
        self.words: np.ndarray = np.asarray(records.words)[indices]
        self.num_images: np.ndarray = np.asarray(records.num_images)[indices]
        self.has_image: np.ndarray = np.asarray(records.has_image)[indices]
        self.odd: np.ndarray = np.asarray(records.odd)[indices]
        self.positions: np.ndarray = np.asarray(records.positions)[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._records[int(self._indices[index])]


def hold_out(records: Records | Subset, fraction: float) -> tuple[Subset, Subset]:
    """Splits records into (train, validation).

    A record is held out when `Records.positions` falls below `fraction`: independent of seed and order,
    so that a record never changes sides.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"data.val_fraction={fraction} must be at least 0 and below 1.")
    held = np.asarray(records.positions) < fraction
    return Subset(records, np.flatnonzero(~held)), Subset(records, np.flatnonzero(held))


def first(records: Records | Subset, limit: int | None) -> Subset:
    """The first `limit` records; all of them for None."""
    if limit is not None and limit < 1:
        raise UsageError(f"data.limit={limit} must be at least 1.")
    return Subset(records, np.arange(len(records))[:limit])


@dataclass(frozen=True)
class Parts:
    """The records of a run.

    Attributes:
        records, val_records: the files that they come from, without refused records; the same one where a share of it
            is held out.
        train, val: what is trained and what is validated on.
        left_out: what is wrong with each refused record of both files.
    """

    records: Records | Subset
    val_records: Records | Subset
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
    """The records of a source, divided into those to train and those to validate on.

    Args:
        cache: see `open_records`.
        val_fraction: share of the images to hold out, where the source brings no validation records.
        limit: train on the first records only; None trains on all.
        on_bad_record: fail | skip.
        odd_records: refuse | train, see `recipe.odd_records`.

    Raises:
        UsageError: a file cannot be read, a record is refused and `on_bad_record` is "fail", or none is left to train
            on.
    """

    left_out: list[str] = []

    def read(path: Path) -> Records | Subset:
        records = open_records(path, cache, image_root=source.image_root, allow_faults=True)
        refused = records.refused(odd_records)
        if refused and on_bad_record == "fail":
            raise refusal(path, refused)
        left_out.extend({fault["entry"]: fault["detail"] for fault in refused}.values())
        if odd_records == "train" or not refused:
            return records
        return Subset(records, np.flatnonzero(~records.odd))

    records = read(source.train)
    if source.val is not None:
        val_records = read(source.val)
        train, val = first(records, None), first(val_records, None)
    else:
        val_records = records
        train, val = hold_out(records, val_fraction)
    if len(train) == 0:
        held = (
            f", and all are held out: lower data.val_fraction={val_fraction:g}"
            if val_records is records and len(val)
            else ""
        )
        raise UsageError(f"There is nothing to train on: {source.train} has {len(records)} usable records{held}.")
    return Parts(records, val_records, first(train, limit), val, left_out)
