"""Records, checked once and then read from an index on disk.

The file is read a single time and rewritten as one line per record with memory-mapped arrays of what
samplers need, so that 665 000 records cost a loader process no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.config import building_folder
from prism_deco.data.llava_json import Record, RecordError, parse_record, read_entries, record_id
from prism_deco.data.packing import ImagePacker, PackedImages, PartialReader, check_space, read_rows, table_files
from prism_deco.errors import UsageError
from prism_deco.files import file_sha256
from prism_deco.llms.prompts import IMAGE_TAG

__all__ = ["IMAGE_TAG", "Record", "Records", "open_records"]

log = logging.getLogger(__name__)

VERSION = 2
"""Of the index; another one is built anew."""

ODD = ("turn_order", "image_tags")
"""Kinds of faults that `recipe.odd_records=train` trains on, unless the record is unusable for another reason."""


class Records(Sequence[Record]):
    """The records of one file, in file order.

    Attributes:
        data_hash: SHA-256 of the JSON file, or of the entries of Parquet files; hexadecimal.
        words: int32[n], whitespace-separated words of all turns (the sampler's length).
        num_images: int32[n].
        has_image: bool[n].
        odd: bool[n], whether only `recipe.odd_records=train` trains on it.
        positions: float64[n] in [0, 1), a hash of each record's image (of its id where it has none;
            common to records that share an image); the held-out split is a threshold on it.
        entries: int64[n], each record's position in the file, unusable ones counted.
        embedded: the images that came with the records, None where they are files of their own.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.data_hash: str = json.loads((folder / "index.json").read_text())["sha256"]
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.words: np.ndarray = np.load(folder / "words.npy", mmap_mode="r")
        self.num_images: np.ndarray = np.load(folder / "num_images.npy", mmap_mode="r")
        self.has_image: np.ndarray = self.num_images > 0
        self.odd: np.ndarray = np.load(folder / "odd.npy", mmap_mode="r")
        self.positions: np.ndarray = np.load(folder / "positions.npy", mmap_mode="r")
        self.entries: np.ndarray = np.load(folder / "entries.npy", mmap_mode="r")
        self.embedded = PackedImages(folder) if (folder / "images.bin").is_file() else None
        self._lines = PartialReader(folder / "records.jsonl")

    @property
    def faults(self) -> list[dict[str, Any]]:
        """What is wrong with entries of the file: {entry, id, kind, detail, usable}; `usable` ones are records, too."""
        with (self._folder / "faults.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def refused(self, odd_records: str) -> list[dict[str, Any]]:
        """The faults that keep an entry out of training.

        Args:
            odd_records: refuse | train, see `recipe.odd_records`.
        """
        odd = ODD if odd_records == "refuse" else ()
        return [fault for fault in self.faults if not fault["usable"] or fault["kind"] in odd]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._offsets[index : index + 2].tolist()
        raw = json.loads(self._lines.read(start, end))
        return Record(raw["id"], tuple(raw["images"]), raw["messages"])

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


def open_records(path: Path, cache: Path, *, image_root: Path | None = None, allow_faults: bool = False) -> Records:
    """Opens the records of a file, through an index in `cache` (built on first use).

    Args:
        path: a LLaVA JSON file (a list, or JSON Lines), or Parquet or Arrow files with the same fields and embedded
            images (see `packing.table_files`).
        image_root: folder of the images; absolute paths below it become relative to it.
        allow_faults: leave out unusable entries and keep odd ones, all to be found in `Records.faults`, instead of
            failing.

    Raises:
        UsageError: the file cannot be read, or a record is refused; names the file and the record.
    """
    tables = table_files(path)
    digest = _fingerprint(tables) if tables else file_sha256(path)
    key = json.dumps([VERSION, digest, image_root and os.path.abspath(image_root)])
    folder = cache / "index" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (folder / "index.json").is_file():
        log.info("Indexing %s", path)
        _build_index(path, tables, digest, image_root, folder)
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


def _fingerprint(files: Sequence[Path]) -> str:
    """Tells whether files are still the same without reading their hundreds of gigabytes."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _build_index(path: Path, tables: list[Path], digest: str, image_root: Path | None, folder: Path) -> None:
    """Writes the index of a file into `folder`: all of it, or nothing.

    Args:
        path: the JSON file; not read if there are `tables`.
        tables: Parquet and Arrow files.
        digest: SHA-256 of the JSON file.
    """
    building = building_folder(folder)
    try:
        if tables:
            check_space(tables, building)
            with closing(ImagePacker(building)) as packer:
                digest = _write_records(map(packer.pack, read_rows(tables)), image_root, building)
        else:
            _write_records(read_entries(path), image_root, building)
        (building / "index.json").write_text(json.dumps({"source": str(path), "sha256": digest}))
        try:
            os.replace(building, folder)
        except OSError:
            # Another process finished the same index first; its content is the same.
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_records(entries: Iterable[Any], image_root: Path | None, folder: Path) -> str:
    """Writes the files of an index, and returns the SHA-256 of its records."""
    offsets = [0]
    words: list[int] = []
    num_images: list[int] = []
    odd: list[bool] = []
    positions: list[float] = []
    numbers: list[int] = []
    joined: list[tuple[str, ...]] = []
    digest = hashlib.sha256()
    with (folder / "records.jsonl").open("wb") as file, (folder / "faults.jsonl").open("w", encoding="utf-8") as faults:
        for number, raw in enumerate(entries):
            name = record_id(raw, number)
            where = f"record {number} (id {name})" if isinstance(raw, dict) and "id" in raw else name
            fault = {"entry": number, "id": name}
            try:
                record, oddities = parse_record(raw, name, image_root)
            except RecordError as error:
                fault |= {"kind": error.kind, "detail": f"{where}: {error}", "usable": False}
                faults.write(json.dumps(fault) + "\n")
                digest.update(json.dumps(fault).encode())
                continue
            for oddity in oddities:
                fault |= {"kind": oddity.kind, "detail": f"{where}: {oddity.detail}", "usable": True}
                faults.write(json.dumps(fault) + "\n")
            line = json.dumps({"id": record.id, "images": record.images, "messages": record.messages}).encode() + b"\n"
            digest.update(line)
            offsets.append(offsets[-1] + file.write(line))
            words.append(sum(len(m["content"].split()) for m in record.messages))
            num_images.append(len(record.images))
            odd.append(any(oddity.kind in ODD for oddity in oddities))
            positions.append(_position(record.images[0] if record.images else record.id))
            numbers.append(number)
            if len(record.images) > 1:
                joined.append(record.images)
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    np.save(folder / "words.npy", np.array(words, dtype=np.int32))
    np.save(folder / "num_images.npy", np.array(num_images, dtype=np.int32))
    np.save(folder / "odd.npy", np.array(odd, dtype=np.bool_))
    np.save(folder / "entries.npy", np.array(numbers, dtype=np.int64))
    np.save(folder / "positions.npy", np.array(positions, dtype=np.float64))
    if joined:
        _join_positions(folder, np.array(positions), joined)
    return digest.hexdigest()


def _join_positions(folder: Path, positions: np.ndarray, joined: Sequence[tuple[str, ...]]) -> None:
    """Gives images that occur together one common position, and with them every record that shows one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for first, *others in joined:
        for other in others:
            # The smaller name leads, so that the result does not depend on the order of the records.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    with (folder / "records.jsonl").open("rb") as file:
        for row, line in enumerate(file):
            images = json.loads(line)["images"]
            if images and images[0] in parent:
                positions[row] = _position(root(images[0]))
    np.save(folder / "positions.npy", positions)


def _position(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
