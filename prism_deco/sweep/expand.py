"""Expands a sweep into its cells: command lines of `train`, each checked by composing it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import GROUPS, parse_value
from prism_deco.config.choices import choice_name, resolve_benchmarks
from prism_deco.errors import UsageError
from prism_deco.stages import final_config
from prism_deco.sweep.spec import PART, RunGrid, Spec, SweepRow

LONGEST_ID = 100
RESERVED = ("logs", "jobs")
"""Names of a sweep's own folders, which no cell may have."""


@dataclass(frozen=True)
class SweepCell:
    """One training of a sweep."""

    id: str
    """Name of its run folder, made of the labels' values."""
    labels: Mapping[str, Any]
    """What tables group by: {"row": "B1", "projector": "avgpool", "seed": 7}."""
    overrides: tuple[str, ...]
    """Arguments of `train`, without `runs_dir` and `run_id`."""
    config: DictConfig
    """What they compose to; the last stage if the recipe has stages."""
    choose: Mapping[str, str] = field(default_factory=dict)
    """Keys whose value is chosen by the results of another part, and that part."""

    @property
    def part(self) -> str | None:
        return self.labels.get(PART)

    @property
    def settings(self) -> dict[str, str]:
        """The overrides by key."""
        return settings_of(self.overrides)

    @property
    def waits(self) -> bool:
        """Whether a value is still to be chosen."""
        return any(key not in self.settings for key in self.choose)


def settings_of(overrides: Iterable[str]) -> dict[str, str]:
    """`key=value` pairs as a mapping."""
    return dict(override.split("=", 1) for override in overrides)


def expand(spec: Spec) -> list[SweepCell]:
    """All cells of a sweep, part by part and row by row, each composed and checked. Values still to be chosen by the
    results of another part keep the recipe's default.

    Raises:
        UsageError: a cell does not compose, or two cells have the same id.
    """
    combinations = []
    for grid in spec.grids:
        for row in grid.rows:
            for values in product(*grid.axes.values()):
                combinations.append((grid, row, dict(zip(grid.axes, values, strict=True))))
    cells: dict[str, SweepCell] = {}
    for number, (grid, row, values) in enumerate(combinations, start=1):
        name = cell_id(row, values)
        overrides = tuple(f"{key}={value}" for key, value in _settings(spec, grid, row, values).items())
        try:
            config = final_config(overrides)
            resolve_benchmarks(config.evaluate.benchmarks or "")  # report a wrong name now, not after training
        except UsageError as error:
            raise UsageError(f"Cell {number} of {len(combinations)}, {name}: {error}") from error
        # Some file systems are case-insensitive.
        if name.casefold() in RESERVED:
            raise UsageError(f"{name} cannot name a cell: every sweep has a folder of that name.")
        if name.casefold() in cells:
            other = " ".join(cells[name.casefold()].overrides)
            raise UsageError(f"Two cells would share the folder {name}: {' '.join(overrides)} and {other}.")
        labels = {**row.labels, **{key: _label(key, value, config) for key, value in values.items()}}
        cells[name.casefold()] = SweepCell(name, labels, overrides, config, grid.choose)
    return list(cells.values())


def cell_id(row: SweepRow, values: Mapping[str, str]) -> str:
    """A short, readable, stable folder name: `B1-avgpool-seed7`."""
    # A label that is only a switch (`true`) is shown by its key.
    parts = [key.rpartition(".")[2] if label is True else _slug(str(label)) for key, label in row.labels.items()]
    for key, value in values.items():
        # A choice speaks for itself (`avgpool`); another value needs its key (`seed7`).
        parts.append(_slug(value) if key in GROUPS else key.rpartition(".")[2] + _slug(value))
    name = "-".join(part for part in parts if part)
    if len(name) > LONGEST_ID:
        # 9 characters for the hyphen and the digest, which keeps cut names distinct.
        name = f"{name[: LONGEST_ID - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", choice_name(text)).strip("._")


def _settings(spec: Spec, grid: RunGrid, row: SweepRow, values: Mapping[str, str]) -> dict[str, str]:
    # From general to specific, so that the specific ones win.
    settings = {**grid.settings, **row.settings, **values}
    for choice, more in spec.choices.items():
        key, _, value = choice.partition("=")
        if settings.get(key) == value:
            # Settings that go with a choice are only defaults: what the sweep sets itself wins.
            settings = more | settings
    return settings


def _label(key: str, value: str, config: DictConfig) -> Any:
    """What tables call a value of an axis: a choice by its name, other values as in the configuration."""
    if key in GROUPS:
        return choice_name(value)
    composed = OmegaConf.select(config, key)
    # Keys of a single stage (align.recipe.lr) are not in the configuration of the last one.
    label = parse_value(key, value) if composed is None else composed
    # A list or a mapping is shown as it was written.
    return value if OmegaConf.is_config(label) or isinstance(label, dict | list | tuple) else label
