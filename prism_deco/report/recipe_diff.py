"""How the settings of a cell differ from those of the recipe by which a table of the paper knows it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import choices, load_choice, load_config
from prism_deco.report.cells import RunCell

_IGNORED = {"name", "stages", "start_from", "num_tokens", "micro_batch_size", "packing", "max_logits"}
"""Keys of a recipe that are checked by themselves, that tables show, or that do not change what is learned."""


def recipe_overrides(config: DictConfig) -> str:
    """How a run differs from its recipe in what is learned, and from the paper's Q-Former; empty where it does not.

    Keys that the run's configuration does not have, since it is of an earlier version, are no difference.

    Args:
        config: of a run with a shipped recipe.
    """
    name, start = str(config.recipe.name), config.recipe.get("start_from")
    default: Any = OmegaConf.to_container(_recipe(name), resolve=True)
    own: Any = OmegaConf.to_container(config.recipe, resolve=True)
    differing = []
    for key, value in own.items():
        if key in default and key not in _IGNORED and _text(value) != _text(default[key]):
            differing.append(f"recipe.{key}={_text(value)} (default {_text(default[key])})")
    before = _stage_before(name)
    if start and before is None:
        differing.append(f"recipe.start_from={Path(start).name} (default null)")
    found = [f"differs from recipe={name}: {'; '.join(differing)}"] if differing else []
    if before is not None and not start:
        found.append(f"no {before} stage (recipe.start_from)")
    if config.projector.name == "qformer" and not config.projector.get("weights"):
        found.append("Q-Former from random weights (the paper's starts from BLIP-2)")
    return "; ".join(found)


def override_sentences(cells: Iterable[RunCell]) -> list[str]:
    """The overrides of cells, each with the names of all that have it."""
    owners: dict[str, list[str]] = {}
    for cell in cells:
        text = recipe_overrides(cell.config) if cell.config is not None else ""
        if text:
            owners.setdefault(text, []).append(cell.id)
    return [f"{', '.join(names)}: {text}." for text, names in owners.items()]


@cache
def _recipe(name: str) -> DictConfig:
    return load_config([f"recipe={name}"]).recipe


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
