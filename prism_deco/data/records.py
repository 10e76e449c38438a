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
from prism_deco.data.hub import HubFile
from prism_deco.data.index import VERSION, build_index
from prism_deco.data.packing import PackedImages, PartialReader, TableFile, table_files
from prism_deco.errors import UsageError
from prism_deco.files import file_sha256

log = logging.getLogger(__name__)


class Records(Sequence[Record]):
    """Records of one file, or of several, read from their indexes.

    Args:
        folders: of the indexes.
        rows: int[n], which of the files' records these are, counted through all of them; None takes all, in file order.
        joined: whether they come from `join`, be it of one file only.

    Attributes:
        words: int32[n].
        num_images: int32[n].
        has_image: bool[n].
        data_hash: SHA-256 of the JSON file, or of the entries of Parquet files; hexadecimal. Of joined files, that of
            theirs and of how often which record is used.
        embedded: the images that came with the records; None if they are files.
    """

    def __init__(self, folders: tuple[Path, ...], rows: np.ndarray | None = None, joined: bool = False):
        self._folders = folders
        self._joined = joined
        self._tables: list[np.ndarray] = [np.load(folder / "rows.npy", mmap_mode="r") for folder in folders]
        self._starts = np.cumsum([0, *map(len, self._tables)])
        self._rows = np.arange(self._starts[-1]) if rows is None else rows
        self._lines = [PartialReader(folder / "records.jsonl") for folder in folders]
        self.words = self.column("words")
        self.num_images = self.column("num_images")
        self.has_image = self.num_images > 0
        hashes = [json.loads((folder / "index.json").read_text())["sha256"] for folder in folders]
        self.data_hash = _joint_hash(hashes, self._rows) if joined else hashes[0]
        self.embedded = PackedImages(folders[0]) if (folders[0] / "images.bin").is_file() else None

    def column(self, name: str) -> np.ndarray:
        """A column of `index.ROW`."""
        columns = [table[name] for table in self._tables]
        return (columns[0] if len(columns) == 1 else np.concatenate(columns))[self._rows]

    def select(self, rows: np.ndarray | slice) -> Records:
        """Some of these records: bool[n], or a slice."""
        return Records(self._folders, self._rows[rows], self._joined)

    def parts(self) -> list[Records]:
        """The records of each file by themselves, all of them."""
        return [Records((folder,)) for folder in self._folders]

    @classmethod
    def join(cls, parts: Sequence[Records], weights: Sequence[float]) -> Records:
        """Records of several files one after the other, each part as often as its weight says: 2 is twice; 0.5 is a
        half of it, drawn once and for all. Images are named `PART/NAME` (`images.JoinedImages`)."""
        folders: list[Path] = []
        rows = []
        start = 0
        for part, weight in zip(parts, weights, strict=True):
            folders += part._folders
            rows.append(start + repeat(part._rows, weight))
            start += part._starts[-1]
        return cls(tuple(folders), np.concatenate(rows), joined=True)

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
        lines = [line for folder in self._folders for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        return [json.loads(line) for line in lines]

    def __getitem__(self, index: Any) -> Record:
        number = int(self._rows[index])
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = self._tables[part][number - self._starts[part]]
        raw = json.loads(self._lines[part].read(int(row["start"]), int(row["end"])))
        images = [f"{part}/{image}" for image in raw["images"]] if self._joined else raw["images"]
        return Record(raw["id"], tuple(images), raw["messages"])

    def __len__(self) -> int:
        return len(self._rows)

    def __reduce__(self) -> Any:
        return Records, (self._folders, self._rows, self._joined)  # other processes map the same files


def repeat(rows: np.ndarray, weight: float) -> np.ndarray:
    """int[n] -> int[about n * weight]: all rows as often as the weight is whole, then a fixed part of them for the
    rest, in their order."""
    drawn = np.random.default_rng(0).permutation(len(rows))[: round(weight % 1 * len(rows))]
    return np.concatenate([np.tile(rows, int(weight)), rows[np.sort(drawn)]])


def _joint_hash(hashes: Sequence[str], rows: np.ndarray) -> str:
    digest = hashlib.sha256("".join(hashes).encode())
    digest.update(rows.astype(np.int64).tobytes())
    return digest.hexdigest()


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
    records = Records((folder,))
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
    positions = records.column("position")
    if fraction and len(records) > 1 and (positions == positions[0]).all():
        log.warning(
            "data.val_fraction=%g cannot divide %d records that all have the same image, or the same id and no image.",
            *(fraction, len(records)),
        )
    held = positions < fraction
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
        limit: train on the first records only (of each set of a mixture); None trains on all.

    Raises:
        UsageError: a file cannot be read, a record is refused and `on_bad_record` is "fail", or none is left to train
            on.
    """
    if source.mixture:
        options: dict[str, Any] = {"val_fraction": val_fraction, "limit": limit}
        options |= {"on_bad_record": on_bad_record, "odd_records": odd_records}
        parts = [open_parts(part, cache, **options) for part, _ in source.mixture]
        weights = [weight for _, weight in source.mixture]
        for (own, weight), part in zip(source.mixture, parts, strict=True):
            if round(weight * len(part.train)) == 0:
                raise UsageError(
                    f"There is nothing to train on: weight {weight:g} takes none of the {len(part.train)} records of "
                    f"{own.train}. Raise its weight in data.mixture, or leave this set out."
                )
        once = [1.0] * len(parts)
        train = Records.join([part.train for part in parts], weights)
        val = Records.join([part.val for part in parts], once)
        return Parts(train, train, val, [fault for part in parts for fault in part.left_out])
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


def _fingerprint(files: Sequence[TableFile]) -> str:
    """Tells whether files are still the same without reading their hundreds of gigabytes."""
    stats = []
    for file in files:
        if isinstance(file, HubFile):
            stats.append((file.repo, file.commit, file.path))
        else:
            stats.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
