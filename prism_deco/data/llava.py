"""LLaVA-format files of the user's own: a JSON list of conversations and an image folder."""

from __future__ import annotations

from pathlib import Path

from prism_deco.data.base import SOURCES, Source
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
