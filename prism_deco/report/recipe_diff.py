"""How the settings of a cell differ from those of the recipe by which a table of the paper knows it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import choices, load_choice, load_config, value_text
from prism_deco.report.cells import RunCell

_IGNORED = {"name", "stages", "start_from", "num_tokens", "micro_batch_size", "packing", "max_logits"}
"""Keys of a recipe that are checked by themselves, that tables show, or that do not change what is learned."""


def recipe_overrides(config: DictConfig) -> str:
    """How a run differs from its recipe in what is learned, and from the paper's Q-Former; empty where it does not.

    Keys that the run's configuration does not have, since it is of an earlier version, are no difference.

    Args:
        config: of a run with a shipped recipe.
    """
    name = str(config.recipe.name)
    start = config.recipe.get("start_from")
    default: Any = OmegaConf.to_container(_recipe(name), resolve=True)
    own: Any = OmegaConf.to_container(config.recipe, resolve=True)
    differing = []
    for key, value in own.items():
        if key in default and key not in _IGNORED:
            ours, usual = (value_text(f"recipe.{key}", one) for one in (value, default[key]))
            differing += [f"recipe.{key}={ours} (default {usual})"] if ours != usual else []
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
