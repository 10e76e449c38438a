"""What the cells of a sweep have in common before they start: features of the same towers for the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prism_deco.sharing import mode, sharing
from prism_deco.sweep.expand import SweepCell


def runs_per_cache(cells: Iterable[SweepCell]) -> dict[str, int]:
    """By the id of a cell, how many cells will use the same cache; by this number `trainer.feature_cache=auto` divides
    what the cache costs."""
    keys = {cell.id: sharing(cell.config) for cell in cells if mode(cell.config) != "off"}
    counts = Counter(keys.values())
    return {name: counts[key] for name, key in keys.items()}
