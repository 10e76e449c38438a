"""Where training data comes from: every source ends in LLaVA-format files on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prism_deco.config import DataConfig, load_choice
from prism_deco.registry import Registry


@dataclass(frozen=True)
class Source:
    """Files of a data set.

    Attributes:
        train: LLaVA JSON with the training conversations.
        image_root: folder that the records' image paths are relative to.
        val: LLaVA JSON of held-out conversations; None holds out a share of `train`.
        benchmarks: root folder of the benchmarks that belong to this source, if any.
    """

    train: Path
    image_root: Path
    val: Path | None = None
    benchmarks: Path | None = None


SOURCES: Registry[Callable[..., Source]] = Registry("data family", package="prism_deco.data")


def build_source(choice: str | Mapping[str, Any], **options: Any) -> Source:
    """Makes (or finds) the files of a data source.

    Args:
        choice: a YAML name under `conf/data`, or the mapping such a YAML holds.
        options: replace the YAML's keys.
    """
    spec = (load_choice("data", choice) if isinstance(choice, str) else dict(choice)) | options
    # What every data choice has concerns how the records are used, not where they come from.
    own = {key: value for key, value in spec.items() if key not in {f.name for f in fields(DataConfig)}}
    return SOURCES.get(spec["family"])(**own)


def cache_dir() -> Path:
    """Folder for what can be made again: indexes, rendered worlds. `PRISM_DECO_CACHE` moves it."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prism_deco"
    return Path(os.environ.get("PRISM_DECO_CACHE", default))
