"""What the settings of a cell are besides the names by which a table of the paper knows it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import choices, load_choice, load_config
from prism_deco.report.cells import Cell

_ELSEWHERE = {"name", "stages", "start_from", "num_tokens"}
"""Keys of a recipe that are looked at by themselves, or that tables show."""

_NOT_LEARNED = {"micro_batch_size", "packing", "max_logits"}
"""Keys that say how a step is computed, not what it learns."""


def departures(config: DictConfig) -> str:
    """How a run departs from its recipe in what is learned, and from the paper's Q-Former; empty where it does not.

    Keys that the run's configuration lacks, since it is of an earlier version, are no difference.

    Args:
        config: of a run with a shipped recipe.
    """
    name, start = str(config.recipe.name), config.recipe.get("start_from")
    default, before = _defaults(name), _stage_before(name)
    own: Any = OmegaConf.to_container(config.recipe, resolve=True)
    differing = [
        f"recipe.{key}={_text(value)} (default {_text(default[key])})"
        for key, value in own.items()
        if key in default and key not in _ELSEWHERE | _NOT_LEARNED and _text(value) != _text(default[key])
    ]
    if start and before is None:
        differing.append(f"recipe.start_from={Path(start).name} (default null)")
    found = [f"differs from recipe={name}: {'; '.join(differing)}"] if differing else []
    if before is not None and not start:
        found.append(f"no {before} stage (recipe.start_from)")
    if config.projector.name == "qformer" and not config.projector.get("weights"):
        found.append("Q-Former from random weights (the paper's starts from BLIP-2)")
    return "; ".join(found)


def sentences(cells: Iterable[Cell]) -> list[str]:
    """The departures of cells, each with the names of all that have it."""
    owners: dict[str, list[str]] = {}
    for cell in cells:
        if cell.config is not None and (text := departures(cell.config)):
            owners.setdefault(text, []).append(cell.id)
    return [f"{', '.join(names)}: {text}." for text, names in owners.items()]


@cache
def _defaults(recipe: str) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(load_config([f"recipe={recipe}"]).recipe, resolve=True)
    return content


@cache
def _stage_before(recipe: str) -> str | None:
    """The stage that precedes a recipe where that is a later stage of another; else None."""
    for choice in choices("recipe"):
        stages = load_choice("recipe", choice).get("stages") or {}
        for before, stage in pairwise(stages):
            if f"recipe={recipe}" in stages[stage]:
                return before
    return None


def _text(value: Any) -> str:
    """A value as a YAML file has it; small numbers as `2e-5`."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return value if isinstance(value, str) else json.dumps(value)
