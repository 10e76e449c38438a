"""What the commands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from prism_deco.config import parse_overrides

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = object

OVERRIDES = "choices and settings, for example: projector=linear recipe.epochs=2 seed=3"


def options_of(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` arguments as a mapping, values read as YAML."""
    options = OmegaConf.to_container(parse_overrides(overrides))
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}


def own_benchmarks(run: Path) -> Path | None:
    """The folder of the benchmarks that came with a run's training data, if any did."""
    place = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["benchmarks"]
    return Path(place) if place else None


def show(renderable: Any) -> None:
    """Prints a table or text."""
    from rich.console import Console

    # A file or a pipe has no width of its own, and 80 columns would break the tables.
    Console(width=None if sys.stdout.isatty() else 120).print(renderable)
