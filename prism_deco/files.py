"""Atomic writes of small files, JSON, checksums, file-system errors with a remedy, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from prism_deco.errors import UsageError


def write_whole(path: Path, content: bytes | str) -> None:
    """Replaces a file atomically; text is written as UTF-8. Several processes may write the same file. The content is
    flushed to disk before the rename, so that a crash of the machine leaves no empty file."""
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with building.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, path)
    except OSError:
        building.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON atomically."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_json(
    path: Path, keys: Iterable[str] = (), *, hint: str = "Restore it from a copy, or write it again."
) -> dict[str, Any]:
    """The object in a JSON file; `UsageError` if the file is damaged.

    Args:
        keys: that the object must have.
        hint: what the user can do about a damaged file.
    """
    with refusals_named(path, hint):
        encoded = path.read_bytes()
    try:
        content = json.loads(encoded.decode())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}). {hint}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it is not a JSON object. {hint}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UsageError(f"{path} is damaged: it has no {', '.join(missing)}. {hint}")
    return content


def read_result(
    path: Path, keys: Iterable[str] = (), *, hint: str = "Remove it, and evaluate the run again."
) -> dict[str, Any]:
    """`read_json` for a benchmark's `metrics.json`, which also checks that the score and its interval are numbers."""
    content = read_json(path, {"interval95", "metrics", "primary", *keys}, hint=hint)
    metrics, primary, interval = content["metrics"], content["primary"], content["interval95"]
    if not isinstance(metrics, dict) or not isinstance(primary, str) or not _is_number(metrics.get(primary)):
        raise UsageError(f"{path} is damaged: it has no value of its primary metric, {primary}. {hint}")
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(_is_number, interval)):
        raise UsageError(f"{path} is damaged: interval95 is {interval}, not two numbers. {hint}")
    return content


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_writable(folder: Path, hint: str) -> None:
    """`UsageError` if a folder, or the nearest existing one above it, is not writable."""
    with refusals_named(folder, hint, "written"):
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()  # fails if the name is too long
        with TemporaryFile(dir=nearest_existing(folder)):
            pass


def check_folder(folder: Path) -> None:
    """`UsageError` if a run folder that the user named is not a folder."""
    with refusals_named(folder, "Give a run folder such as runs/RUN_ID."):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give a run folder such as runs/RUN_ID.")


@contextmanager
def refusals_named(path: Path, hint: str, access: str = "read") -> Iterator[None]:
    """Turns an `OSError` (missing permission, name too long) about a path that the user named into a `UsageError`.

    A missing file is left to the caller to report. Wrap only the operation itself: elsewhere such an error is a bug.
    """
    try:
        yield
    except OSError as error:
        if access == "read" and isinstance(error, FileNotFoundError):
            raise
        raise UsageError(f"{path} cannot be {access} ({error.strerror}). {hint}") from error


def full_disk(places: Iterable[Path], error: BaseException) -> str:
    """The message `PLACE: No space left on device (0.0 MB free).`

    The error of a write does not say where it failed. Assumes the place with the least free space; of several on the
    same disk, the first.
    """
    by_disk: dict[int, tuple[int, Path]] = {}
    for place in places:
        folder = nearest_existing(place.absolute())
        by_disk.setdefault(folder.stat().st_dev, (shutil.disk_usage(folder).free, place))
    free, place = min(by_disk.values())
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    return f"{place}: {reason} ({free / 1e6:.1f} MB free)."


def nearest_existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def remove_unfinished(folder: Path) -> None:
    """Removes temporary files of `write_whole` below a folder, which it leaves when its process is killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that new names survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(folder: Path, name: str, index: Path) -> Path:
    """The path of a file that an index in `folder` lists; `UsageError` if it is outside the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(f"{index} names {name}, a file outside its folder: do not trust it.")
    return folder / path


def verify_sha256(folder: Path, digests: Mapping[str, str], index: Path, hint: str) -> None:
    """Compares files with the SHA-256 that an index lists; `UsageError` if one is missing, different, or outside the
    folder."""
    paths = {name: inside(folder, name, index) for name in digests}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise UsageError(f"{missing[0]} is missing. {hint}")
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(paths, pool.map(file_sha256, paths.values()), strict=True))
    for name, expected in digests.items():
        if found[name] != expected:
            raise UsageError(
                f"{paths[name]} was damaged or replaced after it was written: its SHA-256 is {found[name][:12]}…, "
                f"{index.name} says {expected[:12]}…. {hint}"
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Folder for files that can be regenerated (indexes, rendered worlds, converted weights): `PRISM_DECO_CACHE`."""
    # An empty variable counts as unset: as a path, it would be the working directory.
    if own := os.environ.get("PRISM_DECO_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "prism_deco"
    try:
        return Path.home() / ".cache" / "prism_deco"
    except RuntimeError as error:  # no HOME, and no entry in the user database: many containers
        raise UsageError(
            "This user has no home directory: set PRISM_DECO_CACHE to a folder for indexes and rendered images."
        ) from error


def building_folder(target: Path) -> Path:
    """Creates a folder next to a folder of the cache, to be filled and then renamed; `UsageError` if that fails.

    Unlike `tempfile`'s folders, other users can read it, since a cache can be shared.
    """
    folder = target.with_name(f".building-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{target.parent} cannot be written ({error.strerror}): set PRISM_DECO_CACHE to a folder of your own."
        ) from error
    return folder
