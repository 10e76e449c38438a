"""The data families of the package: files of the user's own, and published data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prism_deco.data.base import SOURCES, Source
from prism_deco.data.packing import table_files
from prism_deco.errors import UsageError


@SOURCES.register("llava")
def llava(json: str | None, image_root: str | None, val_json: str | None = None) -> Source:
    """Takes the files as they are; `UsageError` names one that is missing."""
    if json is None or image_root is None:
        raise UsageError("data=llava needs data.json=FILE and data.image_root=FOLDER.")
    root = Path(image_root)
    source = Source(Path(json), root, Path(val_json) if val_json else None)
    for key, path in (("json", source.train), ("val_json", source.val)):
        if path is not None and not path.is_file():
            raise UsageError(f"data.{key}={path}: there is no such file.")
    if not root.is_dir():
        raise UsageError(f"data.image_root={root}: there is no such folder.")
    return source


@SOURCES.register("embedded")
def embedded(path: str | None, val_path: str | None = None) -> Source:
    """Takes the files as they are; `UsageError` where there are none."""
    if path is None:
        raise UsageError("data=embedded needs data.path=FOLDER (or a .parquet or .arrow file, or a pattern of such).")
    for key, value in (("path", path), ("val_path", val_path)):
        if value is not None and not table_files(Path(value)):
            raise UsageError(f"data.{key}={value}: there is no .parquet or .arrow file.")
    return Source(Path(path), None, Path(val_path) if val_path else None)


@SOURCES.register("published")
def published(root: str | None, json: str, image_root: str, **_: Any) -> Source:
    """The files under the data set's folder; what remains of the YAML tells where they come from."""
    if root is None:
        raise UsageError("Name the data set's folder: data.root=FOLDER (`prism-deco data prepare` fills it).")
    source = Source(Path(root) / json, Path(root) / image_root)
    if not source.train.is_file():
        raise UsageError(f"{source.train} does not exist: run `prism-deco data prepare` with --root {root} first.")
    return source
