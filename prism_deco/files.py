"""Small files that are there whole or not at all, checksums of large ones, and the cache folder."""

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
    """Replaces a file in one step: whatever happens, a reader sees the old content or the new. Several
    processes may write the same file; text is written as UTF-8. The content reaches the disk before the name does, so
    that a crash of the machine leaves no empty file.
    """
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
    """Writes JSON, as `write_whole` does."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_json(
    path: Path, keys: Iterable[str] = (), *, way_out: str = "Restore it from a copy, or write it again."
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        keys: it must have these.
        way_out: what to do about a file that cannot be read.

    Raises:
        UsageError: the file is damaged, or is missing one of the keys.
    """
    with refusals_named(path, way_out):
        encoded = path.read_bytes()
    try:
        content = json.loads(encoded.decode())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}). {way_out}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it is not a JSON object. {way_out}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UsageError(f"{path} is damaged: it has no {', '.join(missing)}. {way_out}")
    return content


def read_result(
    path: Path, keys: Iterable[str] = (), *, way_out: str = "Remove it, and evaluate the run again."
) -> dict[str, Any]:
    """The content of a benchmark's `metrics.json`, as `read_json` gives it, whose score and its interval are numbers.

    Raises:
        UsageError: the file is damaged, or is missing one of the keys.
    """
    content = read_json(path, {"interval95", "metrics", "primary", *keys}, way_out=way_out)
    metrics, primary, interval = content["metrics"], content["primary"], content["interval95"]
    if not isinstance(metrics, dict) or not isinstance(primary, str) or not _is_number(metrics.get(primary)):
        raise UsageError(f"{path} is damaged: it has no value of its primary metric, {primary}. {way_out}")
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(_is_number, interval)):
        raise UsageError(f"{path} is damaged: interval95 is {interval}, not two numbers. {way_out}")
    return content


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_writable(folder: Path, way_out: str) -> None:
    """Raises `UsageError` where nothing can be written to a folder, or to the place where it is to be made."""
    with refusals_named(folder, way_out, "written"):
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()  # its name may be too long
        with TemporaryFile(dir=nearest_existing(folder)):
            pass


def check_folder(folder: Path) -> None:
    """Raises `UsageError` where a run's folder is none."""
    with refusals_named(folder, "Give a run folder such as runs/RUN_ID."):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give a run folder such as runs/RUN_ID.")


@contextmanager
def refusals_named(path: Path, way_out: str, access: str = "read") -> Iterator[None]:
    """Raises `UsageError` where the system refuses a file or folder that the user named: missing permissions, a name
    too long. A file that is missing is the caller's to tell. It stands around the operation alone: elsewhere, such an
    error is a bug."""
    try:
        yield
    except OSError as error:
        if access == "read" and isinstance(error, FileNotFoundError):
            raise
        raise UsageError(f"{path} cannot be {access} ({error.strerror}). {way_out}") from error


def full_disk(places: Iterable[Path], error: BaseException) -> str:
    """`PLACE: No space left on device (0.0 MB free).` A write that fails does not say where: it is the fullest of the
    places that a command writes to; of several on one disk, the first."""
    by_disk: dict[int, tuple[int, Path]] = {}
    for place in places:
        folder = nearest_existing(place.absolute())
        by_disk.setdefault(folder.stat().st_dev, (shutil.disk_usage(folder).free, place))
    free, place = min(by_disk.values())
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    return f"{place}: {reason} ({free / 1e6:.1f} MB free)."


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def remove_unfinished(folder: Path) -> None:
    """Removes what `write_whole` leaves below a folder when its process is killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(folder: Path, name: str, index: Path) -> Path:
    """The file of that name in a folder, which an index lists.

    Raises:
        UsageError: the name leads out of the folder.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(f"{index} names {name}, a file outside its folder: do not trust it.")
    return folder / path


def verify_sha256(folder: Path, digests: Mapping[str, str], index: Path, way_out: str) -> None:
    """Compares files with the SHA-256 that an index says they have, several at a time.

    Raises:
        UsageError: a file is missing, has another content, or lies outside the folder.
    """
    paths = {name: inside(folder, name, index) for name in digests}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise UsageError(f"{missing[0]} is missing. {way_out}")
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(paths, pool.map(file_sha256, paths.values()), strict=True))
    for name, expected in digests.items():
        if found[name] != expected:
            raise UsageError(
                f"{paths[name]} was damaged or replaced after it was written: its SHA-256 is {found[name][:12]}…, "
                f"{index.name} says {expected[:12]}…. {way_out}"
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Folder for what can be made again: indexes, rendered worlds, converted weights. `PRISM_DECO_CACHE` moves it."""
    # A variable that is set to nothing counts as unset: it would name the working directory.
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
    """A new folder next to a folder of the cache, to be filled and renamed. Other users may read it, unlike one of
    `tempfile`'s: a cache can be shared.

    Raises:
        UsageError: the cache is somebody else's, or the disk is full.
    """
    folder = target.with_name(f".building-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{target.parent} cannot be written ({error.strerror}): set PRISM_DECO_CACHE to a folder of your own."
        ) from error
    return folder
