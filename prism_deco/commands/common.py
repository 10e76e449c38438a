"""Helpers that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_deco.config import parse_value
from prism_deco.config.registry import unknown
from prism_deco.config.values import split_pair
from prism_deco.errors import UsageError
from prism_deco.files import read_json

OVERRIDES = "choices and settings (prism-deco keys lists them), and YAML files of these, such as a run's config.yaml"

PLUGINS = "modules to import first; those that a run was trained with are not imported unless they are named"


def count(text: str) -> int:
    """The type of a command-line option that takes a whole number above 0."""
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


@dataclass
class Asked:
    """The arguments of `evaluate` or `explain`, with values as text.

    Attributes:
        runs: arguments without `=`.
        benchmarks: the value of `benchmark=`; None if it is not given.
        options: keys of all these benchmarks, such as `limit`.
        own: keys of single benchmarks (`benchmark.NAME.KEY=`), by name.
        others: the command's own keys.
    """

    runs: list[Path] = field(default_factory=list)
    benchmarks: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    own: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def asked_of(arguments: Iterable[str], others: Iterable[str] = ()) -> Asked:
    """Sorts the arguments of `evaluate` and `explain`.

    Args:
        others: the command's own keys; `GROUP.*` stands for all keys of a group.

    Raises:
        UsageError: `benchmark.NAME` without a key.
    """
    asked = Asked()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        group, _, rest = key.partition(".")
        if not equals:
            asked.runs.append(Path(argument))
        elif key == "benchmark":
            asked.benchmarks = text
        elif group == "benchmark":
            # Split at the last dot: a benchmark's name may contain dots, a key contains none.
            name, _, leaf = rest.rpartition(".")
            if not name or not leaf:
                raise UsageError(f"{argument}: write benchmark.NAME.KEY=VALUE, for example benchmark.pope.root=DIR.")
            asked.own.setdefault(name, {})[leaf] = text
        elif key in others or f"{group}.*" in others:
            asked.others[key] = text
        else:
            asked.options[key] = text
    return asked


def import_named_plugins(asked: Asked) -> None:
    """Imports the modules of `plugins=` (a name or a list) and of the benchmarks' YAMLs. Those named in a run folder
    are not trusted."""
    from prism_deco.config.choices import plugins_of
    from prism_deco.config.registry import import_plugins

    named = parse_value("plugins", asked.others.get("plugins", "[]"))
    import_plugins([named] if isinstance(named, str) else named)
    import_plugins(plugins_of("benchmark", asked.benchmarks or ""))


def import_plugins_only(settings: Iterable[str]) -> None:
    """Handles the settings of a command that only takes `plugins=[...]`."""
    for setting in settings:
        key, _ = split_pair(setting)
        if key != "plugins":
            raise unknown("setting", key, ["plugins"])
    import_named_plugins(asked_of(settings, ["plugins"]))


def own_benchmarks(run: Path) -> Path | None:
    """The folder of the benchmarks that came with a run's training data, if any."""
    place = read_json(run / "manifest.json", ["benchmarks"])["benchmarks"]
    return Path(place) if place else None


def show(renderable: Any) -> None:
    """Prints a table or text."""
    from rich.console import Console

    # For a file or a pipe, rich assumes 80 columns, which would break the tables.
    Console(width=None if sys.stdout.isatty() else 120).print(renderable)
