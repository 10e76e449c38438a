"""The data families of the package: files of the user's own, and published data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prism_deco.data.base import SOURCES, Source
from prism_deco.data.packing import table_files
from prism_deco.errors import UsageError


@SOURCES.register("llava")
def llava(json: str | None, image_root: str | None, val_json: str | None = None) -> Source:
    """The user's own JSON files and image folder; `UsageError` names one that cannot be read."""
    if json is None or image_root is None:
        raise UsageError("data=llava needs data.json=FILE and data.image_root=FOLDER.")
    train = _readable_file("data.json", Path(json))
    val = _readable_file("data.val_json", Path(val_json)) if val_json else None
    return Source(train, _readable_folder("data.image_root", Path(image_root)), val)


@SOURCES.register("embedded")
def embedded(path: str | None, val_path: str | None = None) -> Source:
    """The user's own Parquet or Arrow files; `UsageError` where there are none."""
    if path is None:
        raise UsageError("data=embedded needs data.path=FOLDER (or a .parquet or .arrow file, or a pattern of such).")
    for key, value in (("data.path", path), ("data.val_path", val_path)):
        if value is None:
            continue
        try:
            files = table_files(Path(value))
        except OSError as error:
            raise UsageError(f"{key}={value} cannot be read ({error.strerror}).") from error
        if not files:
            raise UsageError(
                f"{key}={value}: there is no .parquet or .arrow file. JSON is read by data=llava data.json=FILE."
            )
    return Source(Path(path), None, Path(val_path) if val_path else None)


@SOURCES.register("published")
def published(root: str | None, json: str, image_root: str, **_: Any) -> Source:
    """The files under the data set's folder; what remains of the YAML tells where they come from."""
    if root is None:
        raise UsageError("Name the data set's folder: data.root=FOLDER (`prism-deco data prepare` fills it).")
    train = Path(root) / json
    if not os.path.exists(train):
        raise UsageError(f"{train} does not exist: run `prism-deco data prepare` with --root {root} first.")
    return Source(_readable_file("data.root", train), Path(root) / image_root)


def _readable_file(key: str, path: Path) -> Path:
    """The path; `UsageError` names the key it came from where it is no file that can be read."""
    try:
        with path.open("rb"):
            return path
    except FileNotFoundError as error:
        raise UsageError(f"{key}={path}: there is no such file.") from error
    except IsADirectoryError as error:
        raise UsageError(f"{key}={path} is a folder: name the file in it.") from error
    except OSError as error:
        raise UsageError(f"{key}={path} cannot be read ({error.strerror}).") from error


def _readable_folder(key: str, path: Path) -> Path:
    try:
        with os.scandir(path):
            return path
    except FileNotFoundError as error:
        raise UsageError(f"{key}={path}: there is no such folder.") from error
    except NotADirectoryError as error:
        raise UsageError(f"{key}={path} is not a folder.") from error
    except OSError as error:
        raise UsageError(f"{key}={path} cannot be read ({error.strerror}).") from error
