"""The files of a cache: written whole or not at all, verified, and rebuilt where they are not what was written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from prism_deco.data.images import ImageSource, load_image
from prism_deco.errors import UsageError
from prism_deco.features.key import Key, Layout
from prism_deco.files import file_sha256, write_json, write_whole

MISSING = "is not there yet"

_FIELDS = {"sha256", "stamp", "bad", "probe"}


class Shards:
    """The shards of one cache.

    Beside each shard lies its record `NNNNN.json`: hash and time of the file, the rows whose images could not be read,
    and the hash of one of its images. Both are written under another name, synced to the disk and renamed, the record
    last: a shard without one does not count, so that a build that was killed leaves nothing half done. A record per
    shard, and none of all, as builders have then no file in common.

    A shard is verified when a run opens it, which reads little of it: its size must be that of its contents, its file
    the one that was hashed (else it is hashed again, once, and the record says so), its first image of the same bytes
    as then, and the images that could not be read must still be unreadable. A bit that a disk flips without writing
    is not looked for.

    Args:
        folder: of the cache.
        names: of all images, a row each.
        images: where they are read from.
    """

    def __init__(self, folder: Path, layout: Layout, names: Sequence[str], images: ImageSource):
        self.folder = folder
        self.layout = layout
        self.names = names
        self.images = images

    def create(self, key: Key) -> None:
        """Makes the folder, with a description of what it holds for people."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "key.json", key.content)

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def is_recorded(self, shard: int) -> bool:
        """Whether the shard is there, by its record alone."""
        return self._record_path(shard).is_file()

    def bad_rows(self, shard: int) -> list[int]:
        """Rows (of all, not of the shard) whose images could not be read: they hold the blank image's features."""
        record = self._record(shard)
        assert record is not None
        return record["bad"]

    def problem(self, shard: int) -> str | None:
        """Why the shard cannot be used: `MISSING`, or what is wrong with it; None where it can."""
        record, path = self._record(shard), self.path(shard)
        if record is None or not path.is_file():
            return MISSING
        stat = path.stat()
        if stat.st_size != self.layout.size(shard):
            return f"has {stat.st_size} bytes instead of {self.layout.size(shard)}"
        if _stamp(path) != record["stamp"]:
            if file_sha256(path) != record["sha256"]:
                return "has not the content that was written"
            self._write_record(shard, record | {"stamp": _stamp(path)})
        bad: list[int] = record["bad"]
        if record["probe"] != self._probe(shard, bad):
            first = _first(self.layout.rows_of(shard), bad)
            return "was made of another image" + (f" {self.names[first]}" if first is not None else "")
        mended = [self.names[row] for row in bad if self._is_readable(self.names[row])]
        return f"lacks the image {mended[0]}, which could not be read then" if mended else None

    def write(self, shard: int) -> Writer:
        """Begins the shard, whose lock the caller holds."""
        return Writer(self.path(shard), self.layout.header(shard), lambda s, bad: self._finish(shard, s, bad))

    def _finish(self, shard: int, sha256: str, bad: list[int]) -> None:
        path = self.path(shard)
        assert path.stat().st_size == self.layout.size(shard), path
        probe = self._probe(shard, bad)
        self._write_record(shard, {"sha256": sha256, "stamp": _stamp(path), "bad": bad, "probe": probe})

    def _probe(self, shard: int, bad: Sequence[int]) -> str | None:
        """SHA-256 of the encoded first image that could be read; None where none could, or can."""
        row = _first(self.layout.rows_of(shard), bad)
        try:
            return None if row is None else hashlib.sha256(self.images.read(self.names[row])).hexdigest()
        except OSError:
            return None

    def _is_readable(self, name: str) -> bool:
        try:
            load_image(self.images, name)
        except OSError:
            return False
        return True

    def _record_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.json"

    def _record(self, shard: int) -> dict[str, Any] | None:
        try:
            record = json.loads(self._record_path(shard).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.keys() == _FIELDS else None

    def _write_record(self, shard: int, content: Mapping[str, Any]) -> None:
        write_whole(self._record_path(shard), json.dumps(content))


class Writer:
    """Writes a shard as its features come; it gets its name when all of it is on the disk.

    Args:
        path: its name.
        header: what the file begins with.
        finish: is told the SHA-256 of the file and its bad rows, once it has its name.
    """

    def __init__(self, path: Path, header: bytes, finish: Callable[[str, list[int]], None]):
        self._path = path
        self._building = path.with_name(f".{path.name}.tmp")
        self._file = self._building.open("wb")
        self._digest = hashlib.sha256()
        self._finish = finish
        self._add(header)

    def append(self, features: Tensor) -> None:
        """The next rows, dtype[n, T, D] on the CPU."""
        self._add(features.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def commit(self, bad: list[int]) -> None:
        """Puts the file in its place, beside its record."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._building, self._path)
        self._finish(self._digest.hexdigest(), bad)

    def _add(self, data: Any) -> None:
        self._file.write(data)
        self._digest.update(data)


class Locks:
    """A lock per shard: a byte each of one file. The system takes them back from a process that is gone.

    Raises:
        UsageError: the file system has no locks.
    """

    def __init__(self, folder: Path):
        self._file = (folder / "locks").open("a")

    def __enter__(self) -> Locks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()

    def take(self, shard: int, *, wait: bool = False) -> bool:
        """Whether this process has the lock now."""
        try:
            # Not flock, which loader processes would inherit.
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, shard)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise UsageError(
                f"{self._file.name} cannot be locked ({error}): choose another disk with the environment variable "
                "PRISM_DECO_CACHE, or trainer.feature_cache=off."
            ) from error
        return True

    def release(self, shard: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)


def _stamp(path: Path) -> list[int]:
    """Changes whenever a file is written to or replaced."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _first(rows: range, bad: Sequence[int]) -> int | None:
    return next((row for row in rows if row not in bad), None)
