"""The held-out split: by image, so that no image is on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_deco.data.records import Record, Records


class Subset(Sequence[Record]):
    """Some records of a file, in the given order; stands wherever `Records` does."""

    def __init__(self, records: Records | Subset, indices: np.ndarray):
        self._records = records
        self._indices = indices
        self.data_hash = records.data_hash
        self.words: np.ndarray = np.asarray(records.words)[indices]
        self.has_image: np.ndarray = np.asarray(records.has_image)[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._records[int(self._indices[index])]


def hold_out(records: Records, fraction: float) -> tuple[Subset, Subset]:
    """Splits records into (train, validation).

    A record is held out when `Records.positions` falls below `fraction`: independent of seed and order,
    so that a record never changes sides.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"data.val_fraction={fraction} must be at least 0 and below 1.")
    held = np.asarray(records.positions) < fraction
    return Subset(records, np.flatnonzero(~held)), Subset(records, np.flatnonzero(held))


def first(records: Records | Subset, limit: int | None) -> Subset:
    """The first `limit` records; all of them for None."""
    if limit is not None and limit < 1:
        raise ValueError(f"data.limit={limit} must be at least 1.")
    return Subset(records, np.arange(len(records))[:limit])
