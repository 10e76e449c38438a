"""Small files that are there whole or not at all, and hashes of large ones."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from prism_deco.errors import UsageError


def write_whole(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Replaces a file in one step: whatever happens, a reader sees the old content or the new. Several
    processes may write the same file; text is written as UTF-8.

    Args:
        durable: the content reaches the disk before the name does, so that a crash of the machine leaves no empty file.
    """
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with building.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(building, path)


def write_json(path: Path, content: dict[str, Any], *, durable: bool = True) -> None:
    """Writes JSON, as `write_whole` does."""
    write_whole(path, json.dumps(content, indent=2) + "\n", durable=durable)


def check_writable(folder: Path, way_out: str) -> None:
    """Raises `UsageError` where nothing can be written to a folder, or to the place where it is to be made."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}). {way_out}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
