"""What the commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prism_deco.config import parse_value
from prism_deco.config.registry import unknown
from prism_deco.config.values import split_pair
from prism_deco.errors import UsageError
from prism_deco.files import read_json

OVERRIDES = "choices and settings (prism-deco keys lists them), and YAML files of such, a run's config.yaml for example"

PLUGINS = "modules to import first; those that a run was trained with are not imported unless they are named"


@dataclass(frozen=True)
class Asked:
    """The arguments of a command that asks benchmarks of runs; values are the text of the command line.

    Attributes:
        runs: arguments that are no `key=value`.
        benchmarks: names (`benchmark=`); None where none are given.
        options: keys of all these benchmarks, such as `limit`.
        own: keys of single ones (`benchmark.NAME.KEY=`), by their name.
        others: the command's own keys.
    """

    runs: list[Path]
    benchmarks: str | None
    options: dict[str, str]
    own: dict[str, dict[str, str]]
    others: dict[str, str]


def asked_of(arguments: Iterable[str], others: Iterable[str] = ()) -> Asked:
    """Sorts the arguments of `evaluate` and `explain`.

    Args:
        others: keys of the command that are no benchmark's; `GROUP.*` stands for all keys of a group.

    Raises:
        UsageError: `benchmark.NAME` without a key.
    """
    asked = Asked([], None, {}, {}, {})
    benchmarks = None
    for argument in arguments:
        key, equals, text = argument.partition("=")
        group, _, rest = key.partition(".")
        if not equals:
            asked.runs.append(Path(argument))
        elif key == "benchmark":
            benchmarks = text
        elif group == "benchmark":
            name, _, leaf = rest.rpartition(".")
            if not name or not leaf:
                raise UsageError(f"{argument}: write benchmark.NAME.KEY=VALUE, for example benchmark.pope.root=DIR.")
            asked.own.setdefault(name, {})[leaf] = text
        elif key in others or f"{group}.*" in others:
            asked.others[key] = text
        else:
            asked.options[key] = text
    return replace(asked, benchmarks=benchmarks)


def import_named_plugins(asked: Asked) -> None:
    """Imports the modules of `plugins=`, a name or a list of names, and of the benchmarks' YAMLs. Those that a run's
    folder names are not trusted."""
    from prism_deco.config.choices import plugins_of
    from prism_deco.config.registry import import_plugins

    named = parse_value("plugins", asked.others.get("plugins", "[]"))
    import_plugins([named] if isinstance(named, str) else named)
    import_plugins(plugins_of("benchmark", asked.benchmarks or ""))


def import_plugins_only(settings: Iterable[str]) -> None:
    """Does what the settings of a command say that takes `plugins=[...]` alone."""
    for setting in settings:
        key, _ = split_pair(setting)
        if key != "plugins":
            raise unknown("setting", key, ["plugins"])
    import_named_plugins(asked_of(settings, ["plugins"]))


def own_benchmarks(run: Path) -> Path | None:
    """The folder of the benchmarks that came with a run's training data, if any did."""
    place = read_json(run / "manifest.json", ["benchmarks"])["benchmarks"]
    return Path(place) if place else None


def show(renderable: Any) -> None:
    """Prints a table or text."""
    from rich.console import Console

    # A file or a pipe has no width of its own, and 80 columns would break the tables.
    Console(width=None if sys.stdout.isatty() else 120).print(renderable)
