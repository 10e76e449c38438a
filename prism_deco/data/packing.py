"""Parquet and Arrow files with embedded images: their rows are read once, and the images packed into one file.

Parquet is compressed in groups of rows, which training in random order would decompress again and again. Only packing
needs pyarrow.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.data.hub import LISTING, HubFile, read_listing
from prism_deco.data.images import ImageSource
from prism_deco.data.llava_json import is_image_key
from prism_deco.errors import UsageError

log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".arrow")
TableFile = Path | HubFile
TURNS = ("conversations", "messages", "texts")
IMAGES = ("image", "images")
_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
_SPLIT = re.compile(f"(?<![a-z])({'|'.join(_TRAIN + _HELD_OUT)})(?![a-z])", re.IGNORECASE)
"""Words in the name of a file or its folder from which `datasets` infers the split."""


def table_files(path: Path) -> list[TableFile]:
    """The Parquet or Arrow files of a data set, sorted.

    Files of held-out splits (`test-*.parquet`, a folder `validation`) are skipped with a warning, unless there are no
    others.

    Args:
        path: one file, a pattern such as `data/train-*.parquet`, a folder (written by `save_to_disk`, or a clone of a
            hub repository), or a list of files on the hub (`hub.list_files`).
    """
    named: dict[str, TableFile] = {}
    files: list[Path] = []
    if path.suffix == LISTING:
        named = {file.path: file for file in read_listing(path)}
    elif path.is_file():
        files = [path]
    elif "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    else:
        files = sorted(path.rglob("*"))
    # `datasets` caches intermediate results as `cache-*.arrow` next to its own files.
    files = [file for file in files if file.suffix in SUFFIXES and not file.name.startswith("cache-")]
    root = path if path.is_dir() else path.parent
    named |= {str(file.relative_to(root)): file for file in files}
    # The last word counts, so a file's own name overrides its folder's.
    splits = {name: (_SPLIT.findall(name.lower()) or _TRAIN)[-1] for name in named}
    train = [name for name, split in splits.items() if split not in _HELD_OUT]
    left_out = [str(named[name]) for name, split in splits.items() if split in _HELD_OUT]
    if not train:
        return [*named.values()]
    if left_out:
        _warn_of_splits(len(left_out), left_out[0])
    return [named[name] for name in train]


@cache  # a run lists the files several times, but warns once
def _warn_of_splits(count: int, first: str) -> None:
    log.warning(
        "Left out, because their names say that they are not training data: %s%s. To read such files, name them alone: "
        "in data.val_path, say, or as a set of data=mixture.",
        *(first, f" and {count - 1} more" if count > 1 else ""),
    )


def read_rows(files: Sequence[TableFile]) -> Iterator[dict[str, Any]]:
    """Yields the rows as entries (see `formats.as_llava`); images are bytes, `{"bytes", "path"}`, or lists of these."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("Reading Parquet and Arrow files needs pyarrow: pip install 'prism-deco[parquet]'") from error
    for file in files:
        try:
            with file.on_disk() if isinstance(file, HubFile) else nullcontext(file) as path:
                if file.suffix == ".parquet":
                    table = pq.ParquetFile(path, memory_map=True)
                    names = _columns(file, table.schema_arrow.names)
                    batches = table.iter_batches(batch_size=64, columns=names)
                else:
                    reader = _open_arrow(pa, pa.memory_map(str(path)))
                    names = _columns(file, reader.schema.names)
                    batches = (batch.select(names) for batch in reader)
                for batch in batches:
                    for row in batch.to_pylist():
                        # Columns mark absent values by null, LLaVA's format by omitting the key.
                        yield {key: value for key, value in row.items() if value is not None}
        except (pa.ArrowInvalid, OSError) as error:
            raise UsageError(f"{file} cannot be read ({error}). Is the download complete?") from error


def _open_arrow(pa: Any, source: Any) -> Any:
    """The record batches of an Arrow file, in the stream format (which `datasets` writes) or the file format."""
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        return pa.RecordBatchReader.from_batches(reader.schema, batches)


def _columns(file: TableFile, names: list[str]) -> list[str]:
    if not set(TURNS) & set(names):
        raise UsageError(
            f"{file} has the columns {', '.join(names)}; it needs one of {', '.join(TURNS)}, and for images "
            f"{' or '.join(IMAGES)}."
        )
    images = [name for name in names if is_image_key(name)]
    if images and not set(IMAGES) & set(images):
        raise UsageError(f"{file}: the column {images[0]} is not read: images stand in the column image or images.")
    # Other image columns are read, too, so that `parse_record` can refuse a row with its image in one of them.
    return [name for name in names if name in ("id", *TURNS, *images)]


class ImagePacker:
    """Writes the files that `PackedImages` reads."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = (folder / "images.bin").open("wb")
        self._spans: dict[int, tuple[int, int]] = {}

    def close(self) -> None:
        """Writes the index of the images."""
        self._file.close()
        names = np.array(sorted(self._spans), dtype=np.uint64)
        spans = np.array([self._spans[name] for name in names.tolist()], dtype=np.int64).reshape(-1, 2)
        np.save(self._folder / "image_names.npy", names)
        np.save(self._folder / "image_spans.npy", spans)

    def pack(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Stores the images of an entry, and returns the entry with their names in place of their bytes."""
        images = entry.get("image", [])
        images = images if isinstance(images, list) else [images]
        return entry | {"image": [self._add(image) for image in images]}

    def _add(self, image: Any) -> str:
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            return ""  # `parse_record` refuses the record
        name = hashlib.sha256(data).digest()[:8]
        key = int.from_bytes(name)
        if key not in self._spans:
            start = self._file.tell()
            self._spans[key] = (start, start + self._file.write(data))
        return name.hex()


class PackedImages(ImageSource):
    """Images packed into one file. An image's name is the first 16 hexadecimal digits of its SHA-256, so that equal
    images are stored once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: np.ndarray = np.load(folder / "image_names.npy", mmap_mode="r")
        self._spans: np.ndarray = np.load(folder / "image_spans.npy", mmap_mode="r")
        self._data = PartialReader(folder / "images.bin")

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        row = self._row(name)
        if row is None:
            raise FileNotFoundError(f"{self.location(name)} does not exist.")
        start, end = self._spans[row].tolist()
        return self._data.read(start, end)

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._row(name) is None]

    def location(self, name: str) -> str:
        return f"embedded image {name} ({self.folder})"

    def _row(self, name: str) -> int | None:
        key = np.uint64(int(name, 16))
        row = int(np.searchsorted(self._names, key))
        return row if row < len(self._names) and self._names[row] == key else None


@dataclass
class PartialReader:
    """Reads byte ranges of a file. Can be pickled to other processes.

    Not a memory map, whose pages count towards the memory of each process that touches them: over an epoch, that is the
    whole file. The system's page cache serves all processes just as well.
    """

    path: Path
    _descriptor: int | None = field(default=None, init=False)

    def read(self, start: int, end: int) -> bytes:
        """Bytes start..end of the file."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        # Not seek and read, since forked processes share the file's position.
        return os.pread(self._descriptor, end - start, start)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}


def check_space(files: Sequence[TableFile], folder: Path) -> None:
    """`UsageError` if the unpacked images would not fit on the disk of `folder`."""
    needed = sum(file.size if isinstance(file, HubFile) else file.stat().st_size for file in files)
    free = shutil.disk_usage(folder).free
    sizes = f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
    log.info("Unpacking images into %s: %s", folder, sizes)
    if needed > free:
        raise UsageError(f"Images cannot be unpacked into {folder}: {sizes}. Set PRISM_DECO_CACHE to another disk.")
