"""The folder for what can be made again."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from prism_deco.errors import UsageError


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
