"""Published data sets, as `prism-deco data prepare` lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prism_deco.data.base import SOURCES, Source
from prism_deco.errors import UsageError


@SOURCES.register("published")
def published(root: str | None, json: str, image_root: str, **_: Any) -> Source:
    """The files under the data set's folder; what remains of the YAML tells where they come from."""
    if root is None:
        raise UsageError("Name the data set's folder: data.root=FOLDER (`prism-deco data prepare` fills it).")
    source = Source(Path(root) / json, Path(root) / image_root)
    if not source.train.is_file():
        raise UsageError(f"{source.train} does not exist: run `prism-deco data prepare` with --root {root} first.")
    return source
