"""Records, checked once and then read from an index on disk; which of them a run trains on and validates on.

The file is read a single time and rewritten as one line per record, with a memory-mapped table of what samplers need:
665 000 records cost a loader process no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.data.base import Record, Source
from prism_deco.data.index import VERSION, build_index
from prism_deco.data.packing import PackedImages, PartialReader, table_files
from prism_deco.errors import UsageError
from prism_deco.files import file_sha256
from prism_deco.llms.prompts import IMAGE_TAG

__all__ = ["IMAGE_TAG", "Record", "Records", "open_records"]

log = logging.getLogger(__name__)


class Records(Sequence[Record]):
    """Records of one file, read from its index.

    Args:
        folder: of the index.
        rows: int[n], which of the file's records these are; None takes all, in file order.

    Attributes:
        words: int32[n].
        num_images: int32[n].
        has_image: bool[n].
        data_hash: SHA-256 of the JSON file, or of the entries of Parquet files; hexadecimal.
        embedded: the images that came with the records; None if they are files.
    """

    def __init__(self, folder: Path, rows: np.ndarray | None = None):
        self._folder = folder
        self._table: np.ndarray = np.load(folder / "rows.npy", mmap_mode="r")
        self._rows = np.arange(len(self._table)) if rows is None else rows
        self._lines = PartialReader(folder / "records.jsonl")
        self.words = self.column("words")
        self.num_images = self.column("num_images")
        self.has_image = self.num_images > 0
        self.data_hash = json.loads((folder / "index.json").read_text())["sha256"]
        self.embedded = PackedImages(folder) if (folder / "images.bin").is_file() else None

    def column(self, name: str) -> np.ndarray:
        """A column of `index.ROW`."""
        return self._table[name][self._rows]

    def select(self, rows: np.ndarray | slice) -> Records:
        """Some of these records: bool[n], or a slice."""
        return Records(self._folder, self._rows[rows])

    def refused(self, odd_records: str) -> list[dict[str, Any]]:
        """What keeps entries of the file out of training: {entry, id, kind, detail, usable}. A usable one is a record.

        Args:
            odd_records: refuse | train, see `recipe.odd_records`.
        """
        faults = self._faults("refused.jsonl")
        return [fault for fault in faults if odd_records == "refuse" or not fault["usable"]]

    def noted(self) -> list[dict[str, Any]]:
        """What is odd about entries and keeps none out of training: {entry, id, kind, detail}."""
        return self._faults("noted.jsonl")

    def _faults(self, name: str) -> list[dict[str, Any]]:
        with (self._folder / name).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def __getitem__(self, index: Any) -> Record:
        row = self._table[self._rows[index]]
        raw = json.loads(self._lines.read(int(row["start"]), int(row["end"])))
        return Record(raw["id"], tuple(raw["images"]), raw["messages"])

    def __len__(self) -> int:
        return len(self._rows)

    def __reduce__(self) -> Any:
        return Records, (self._folder, self._rows)  # other processes map the same files


def open_records(path: Path, cache: Path, *, image_root: Path | None = None, allow_faults: bool = False) -> Records:
    """Opens the records of a file, through an index in `cache` (built on first use).

    Args:
        path: a LLaVA JSON file (a list, or JSON Lines), or Parquet or Arrow files with the same fields and embedded
            images (see `packing.table_files`).
        image_root: folder of the images; absolute paths below it become relative to it.
        allow_faults: leave out unusable entries and keep odd ones (`Records.refused` lists both), instead of failing.

    Raises:
        UsageError: the file cannot be read, or a record is refused; names the file and the record.
    """
    tables = table_files(path)
    digest = _fingerprint(tables) if tables else file_sha256(path)
    key = json.dumps([VERSION, digest, image_root and os.path.abspath(image_root)])
    folder = cache / "index" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (folder / "index.json").is_file():
        log.info("Indexing %s", path)
        build_index(path, tables, digest, image_root, folder)
    records = Records(folder)
    if not allow_faults and (refused := records.refused("refuse")):
        raise refusal(path, refused)
    return records


def refusal(path: Path, refused: Sequence[dict[str, Any]]) -> UsageError:
    """The error for refused records: the first of them, and the ways out."""
    first = refused[0]
    others = len({fault["entry"] for fault in refused}) - 1
    more = f"{others} more records are refused; `prism-deco data check` lists them. " if others else ""
    odd = "Train on them as PRISM and LLaVA do with recipe.odd_records=train, or leave" if first["usable"] else "Leave"
    return UsageError(f"{path}, {first['detail']} {more}{odd} such records out with data.on_bad_record=skip.")


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


def _fingerprint(files: Sequence[Path]) -> str:
    """Tells whether files are still the same without reading their hundreds of gigabytes."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
