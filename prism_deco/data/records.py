"""LLaVA records, checked once and then read from an index on disk.

The file is read a single time and rewritten as one line per record with memory-mapped arrays of what
samplers need, so that 665 000 records cost a loader process no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.data.images import PackedImages
from prism_deco.data.index import build_index
from prism_deco.data.llava_json import Record
from prism_deco.data.packing import table_files
from prism_deco.data.partial import PartialReader
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
