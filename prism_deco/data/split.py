"""The records of a run: what is trained on, and what is held out, by image, so that no image is on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prism_deco.data.base import Source
from prism_deco.data.records import Records, open_records, refusal
from prism_deco.errors import UsageError


def hold_out(records: Records, fraction: float) -> tuple[Records, Records]:
    """Splits records into (train, validation).

    A record is held out if the hash of its image falls below `fraction`, whatever the seed and the order: it never
    changes sides, and no image is on both.
    """
    held = records.column("position") < fraction
    return records.select(~held), records.select(held)


@dataclass(frozen=True)
class Parts:
    """The records of a run.

    Attributes:
        records: all usable records of the training file.
        train, val: what is trained on, and what is validated on.
        left_out: what is wrong with each refused record of both files.
    """

    records: Records
    train: Records
    val: Records
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

    def read(path: Path) -> Records:
        records = open_records(path, cache, image_root=source.image_root, allow_faults=True)
        refused = records.refused(odd_records)
        if refused and on_bad_record == "fail":
            raise refusal(path, refused)
        left_out.extend({fault["entry"]: fault["detail"] for fault in refused}.values())
        return records if odd_records == "train" else records.select(~records.column("odd"))

    records = read(source.train)
    if source.val is not None:
        train, val = records, read(source.val)
    else:
        train, val = hold_out(records, val_fraction)
    if len(train) == 0:
        hint = f", and all are held out: lower data.val_fraction={val_fraction:g}" if len(records) else ""
        raise UsageError(f"There is nothing to train on: {source.train} has {len(records)} usable records{hint}.")
    return Parts(records, train.select(slice(limit)), val, left_out)
