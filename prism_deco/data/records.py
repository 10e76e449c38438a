"""Records, read from an index on disk, and their split into training and validation.

A file is parsed and checked once, and rewritten as one line per record with a memory-mapped table of what samplers
need, so that even 665 000 records take no memory in a loader process.
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
        folders: the folders of the indexes.
        rows: int[n], the selected records, numbered through all files; None selects all, in file order.
        joined: whether they come from `join`, even if of a single file.

    Attributes:
        words: int32[n].
        num_images: int32[n].
        has_image: bool[n].
        data_hash: hexadecimal SHA-256 of the JSON file, or of the entries of Parquet files; for joined files, of their
            hashes and the selected rows.
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
        """A column of `index.ROW`, one value per record."""
        columns = [table[name] for table in self._tables]
        return (columns[0] if len(columns) == 1 else np.concatenate(columns))[self._rows]

    def select(self, rows: np.ndarray | slice) -> Records:
        """The records of a mask bool[n], or of a slice."""
        return Records(self._folders, self._rows[rows], self._joined)

    def parts(self) -> list[Records]:
        """All records of each file, as one `Records` per file."""
        return [Records((folder,)) for folder in self._folders]

    @classmethod
    def join(cls, parts: Sequence[Records], weights: Sequence[float]) -> Records:
        """Concatenates records of several files. A part of weight 2 is repeated twice; of weight 0.5, a fixed random
        half of it is used. Images are named `PART/NAME` (`images.JoinedImages`)."""
        folders: list[Path] = []
        rows = []
        start = 0
        for part, weight in zip(parts, weights, strict=True):
            folders += part._folders
            rows.append(start + repeat(part._rows, weight))
            start += part._starts[-1]
        return cls(tuple(folders), np.concatenate(rows), joined=True)

    def refused(self, odd_records: str) -> list[dict[str, Any]]:
        """The faults that keep entries out of training: {entry, id, kind, detail, usable}.

        A fault is `usable` if its entry is odd but still a record, which `odd_records="train"` trains on.
        """
        faults = self._faults("refused.jsonl")
        return [fault for fault in faults if odd_records == "refuse" or not fault["usable"]]

    def noted(self) -> list[dict[str, Any]]:
        """Faults that keep no entry out of training: {entry, id, kind, detail}."""
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
    """int[n] -> int[about n * weight]: all rows repeated floor(weight) times, then a fixed random subset of them, in
    their order, for the fractional part."""
    drawn = np.random.default_rng(0).permutation(len(rows))[: round(weight % 1 * len(rows))]
    return np.concatenate([np.tile(rows, int(weight)), rows[np.sort(drawn)]])


def _joint_hash(hashes: Sequence[str], rows: np.ndarray) -> str:
    digest = hashlib.sha256("".join(hashes).encode())
    digest.update(rows.astype(np.int64).tobytes())
    return digest.hexdigest()


def open_records(path: Path, cache: Path, *, image_root: Path | None = None, allow_faults: bool = False) -> Records:
    """Opens the records of a file through an index in `cache`, which is built on first use.

    Args:
        path: a LLaVA JSON file (a list, or JSON Lines), or Parquet or Arrow files with the same fields and embedded
            images (see `packing.table_files`).
        image_root: folder of the images; absolute paths below it become relative to it.
        allow_faults: instead of failing, skip unusable entries and keep odd ones (`Records.refused` lists both).
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
    """The error for refused records: names the first of them, and the options that accept or skip them."""
    first = refused[0]
    others = len({fault["entry"] for fault in refused}) - 1
    more = f"{others} more records are refused; `prism-deco data check` lists them. " if others else ""
    odd = "Train on them as PRISM and LLaVA do with recipe.odd_records=train, or leave" if first["usable"] else "Leave"
    return UsageError(f"{path}, {first['detail']} {more}{odd} such records out with data.on_bad_record=skip.")


def hold_out(records: Records, fraction: float) -> tuple[Records, Records]:
    """Splits records into (train, validation).

    A record is held out if the hash of its image is below `fraction`. So the split depends on neither seed nor order,
    and no image is on both sides.
    """
    positions = records.column("position")
    if fraction and len(records) > 1 and (positions == positions[0]).all():
        log.warning(
            "data.val_fraction=%g cannot split %d records that all have the same image, or the same id and no image.",
            *(fraction, len(records)),
        )
    held = positions < fraction
    return records.select(~held), records.select(held)


@dataclass(frozen=True)
class Parts:
    """The records of a run.

    Attributes:
        records: all usable records of the training file.
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
    """The training and validation records of a source.

    Args:
        cache: see `open_records`.
        val_fraction: fraction of the images to hold out if the source has no validation records.
        limit: train on the first `limit` records only (of each set of a mixture); None trains on all.
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
    """Hash of names, sizes and times: the files may have hundreds of gigabytes, too many to read."""
    stats = []
    for file in files:
        if isinstance(file, HubFile):
            stats.append((file.repo, file.commit, file.path))
        else:
            stats.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
