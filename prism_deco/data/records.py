"""LLaVA records, checked once and then read from an index on disk.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.config import building_folder
from prism_deco.data.llava_json import Record, RecordError, parse_record, read_json_list
from prism_deco.data.packing import ImagePacker, PackedImages, PartialReader, check_space, read_rows, table_files
from prism_deco.errors import UsageError
from prism_deco.files import file_sha256
from prism_deco.llms.prompts import IMAGE_TAG

__all__ = ["IMAGE_TAG", "Record", "Records", "open_records"]

log = logging.getLogger(__name__)


class Records(Sequence[Record]):
    """The records of one file, in file order.

    Attributes:
        data_hash: SHA-256 of the JSON file, or of the entries of Parquet files; hexadecimal.
        words: int32[n], whitespace-separated words of all turns (the sampler's length).
        has_image: bool[n].
        positions: float64[n] in [0, 1), a hash of each record's image (of its id where it has none;
            common to records that share an image); the held-out split is a threshold on it.
        entries: int64[n], each record's position in the file, faulty ones counted.
        embedded: the images that came with the records, None where they are files of their own.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.data_hash: str = json.loads((folder / "index.json").read_text())["sha256"]
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.words: np.ndarray = np.load(folder / "words.npy", mmap_mode="r")
        self.has_image: np.ndarray = np.load(folder / "has_image.npy", mmap_mode="r")
        self.positions: np.ndarray = np.load(folder / "positions.npy", mmap_mode="r")
        self.entries: np.ndarray = np.load(folder / "entries.npy", mmap_mode="r")
        self.embedded = PackedImages(folder) if (folder / "images.bin").is_file() else None
        self._lines = PartialReader(folder / "records.jsonl")

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Entries of the file that are no usable records: {entry, id, kind, detail}."""
        with (self._folder / "faults.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

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


def open_records(path: Path, cache: Path, *, allow_faults: bool = False) -> Records:
    """Opens the records of a file, through an index in `cache` (built on first use).

    Args:
        path: a LLaVA JSON file, or Parquet or Arrow files with the same fields and embedded images
            (see `packing.table_files`).
        allow_faults: leave out malformed records, to be found in `Records.faults`, instead of failing.

    Raises:
        UsageError: the file cannot be read, or a record is malformed; names the file and the record.
    """
    tables = table_files(path)
    digest = _fingerprint(tables) if tables else file_sha256(path)
    folder = cache / "index" / digest[:16]
    if not (folder / "index.json").is_file():
        log.info("Indexing %s", path)
        build_index(path, tables, digest, folder)
    records = Records(folder)
    if not allow_faults and (faults := records.faults):
        more = f" So are {len(faults) - 1} more: `prism-deco data check` lists them." if len(faults) > 1 else ""
        raise UsageError(f"{path} {faults[0]['detail']}{more}")
    return records


def _fingerprint(files: Sequence[Path]) -> str:
    """Tells whether files are still the same without reading their hundreds of gigabytes."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def build_index(path: Path, tables: list[Path], digest: str, folder: Path) -> None:
    """Writes the index of a file into `folder`: all of it, or nothing.

    Args:
        path: the JSON file; not read if there are `tables`.
        tables: Parquet and Arrow files.
        digest: SHA-256 of the JSON file.
    """
    building = building_folder(folder)
    try:
        with ExitStack() as stack:
            entries: Iterable[Any] = read_json_list(path)
            if tables:
                check_space(tables, building)
                packer = stack.enter_context(ImagePacker(building))
                entries = (packer.pack(row) for row in read_rows(tables))
            written = _write_records(entries, building)
        index = {"source": str(path), "sha256": written if tables else digest}
        (building / "index.json").write_text(json.dumps(index))
        try:
            os.replace(building, folder)
        except OSError:
            # Another process finished the same index first; its content is the same.
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_records(entries: Iterable[Any], folder: Path) -> str:
    """Writes the files of an index, and returns the SHA-256 of its records."""
    offsets, words, has_image, positions, numbers = [0], [], [], [], []
    joined: list[tuple[str, ...]] = []
    digest = hashlib.sha256()
    with (folder / "records.jsonl").open("wb") as file, (folder / "faults.jsonl").open("w", encoding="utf-8") as faults:
        for number, raw in enumerate(entries):
            try:
                record = parse_record(raw, f"record {number}")
            except RecordError as error:
                fault = {"entry": number, "id": error.id, "kind": error.kind, "detail": str(error)}
                faults.write(json.dumps(fault) + "\n")
                digest.update(json.dumps(fault).encode())
                continue
            line = json.dumps({"id": record.id, "images": record.images, "messages": record.messages}).encode() + b"\n"
            digest.update(line)
            offsets.append(offsets[-1] + file.write(line))
            words.append(sum(len(m["content"].split()) for m in record.messages))
            has_image.append(bool(record.images))
            positions.append(_position(record.images[0] if record.images else record.id))
            numbers.append(number)
            if len(record.images) > 1:
                joined.append(record.images)
    arrays: dict[str, tuple[list[Any], Any]] = {
        "offsets": (offsets, np.int64),
        "words": (words, np.int32),
        "has_image": (has_image, np.bool_),
        "entries": (numbers, np.int64),
        "positions": (positions, np.float64),
    }
    for name, (values, dtype) in arrays.items():
        np.save(folder / f"{name}.npy", np.array(values, dtype=dtype))
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
