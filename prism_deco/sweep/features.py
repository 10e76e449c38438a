"""What the cells of a sweep have in common before they start: features of the same towers for the same images."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from prism_deco.stages import final_config
from prism_deco.sweep.ledger import Entry, Ledger


def shared_cache(folder: Path, entry: Entry) -> list[str]:
    """Tells a cell how many cells will use the same cache, so that its `trainer.feature_cache=auto` decides by what
    the cache costs and saves all of them; nothing where there is none to share with.

    Args:
        folder: the sweep's folder; its ledger names the cells.
    """
    if not (folder / "ledger.json").is_file():
        return []
    own = _sharing(tuple(entry.overrides))
    entries = Ledger.read(folder).entries.values()
    runs = sum(own is not None and _sharing(tuple(other.overrides)) == own for other in entries)
    return [f"trainer.feature_cache_runs={runs}"] if runs > 1 else []


@lru_cache(maxsize=1024)
def _sharing(overrides: tuple[str, ...]) -> str | None:
    """Equal for cells that share a cache; None for one that will have none."""
    from prism_deco.plan.features import mode, sharing
    from prism_deco.plan.setup import setup_of
    from prism_deco.registry import import_plugins

    try:
        config = final_config(overrides)
        import_plugins(config.plugins)
        return None if mode(config) == "off" else sharing(config, setup_of(config))
    except ValueError:
        return None  # a cell of an earlier call that composes no more
