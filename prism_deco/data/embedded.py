"""Conversations with embedded images: Parquet files, or the Arrow files of Hugging Face `datasets`."""

from __future__ import annotations

from pathlib import Path

from prism_deco.data.base import SOURCES, Source
from prism_deco.data.packing import table_files
from prism_deco.errors import UsageError


@SOURCES.register("embedded")
def embedded(path: str | None, val_path: str | None = None) -> Source:
    """Takes the files as they are; `UsageError` where there are none."""
    if path is None:
        raise UsageError("data=embedded needs data.path=FOLDER (or a .parquet or .arrow file, or a pattern of such).")
    for key, value in (("path", path), ("val_path", val_path)):
        if value is not None and not table_files(Path(value)):
            raise UsageError(f"data.{key}={value}: there is no .parquet or .arrow file.")
    return Source(Path(path), None, Path(val_path) if val_path else None)
