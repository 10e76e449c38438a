"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from prism_deco.config.schema import AS_TRAINED
from prism_deco.evaluation.predictions import ASK


def table(
    results: Sequence[Mapping[str, Any]],
    chance: Mapping[str, float] | None = None,
    blind: Mapping[str, float] | None = None,
) -> Table:
    """A row per benchmark and variant.

    Args:
        results: contents of `metrics.json` files.
        chance: score of the best constant answer by benchmark (see `scoring.chance`).
        blind: score of a trained image-blind model by benchmark.
    """
    # In a terminal of 80 columns, only the metric wraps, between its name and the variant.
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    grid.add_column("benchmark", no_wrap=True)
    grid.add_column("metric (variant)")
    for name in ("n", "score", "95 % interval", "chance", "blind", "invalid"):
        grid.add_column(name, justify="right", no_wrap=True)
    for result in results:
        name = result["benchmark"]
        low, high = result["interval95"]
        ask = (result["decoding"] or {}).get(ASK, AS_TRAINED)
        asked = "" if ask == AS_TRAINED else f", {ask}"
        compared = [f"{low:.1f} to {high:.1f}", _cell(chance, name), _cell(blind, name)]
        for number, variant in enumerate(result["variants"]):
            # The first variant's metrics have plain names; only it has an interval and references to compare with.
            prefix = f"{variant}/" if number else ""
            grid.add_row(
                Text("" if number else name),
                f"{result['primary']} ({variant}{asked})",
                str(result["n"]),
                f"{result['metrics'][prefix + result['primary']]:.1f}",
                *(["", "", ""] if number else compared),
                f"{result['metrics'][f'{prefix}invalid_rate']:.1%}",
            )
    return grid


def _cell(values: Mapping[str, float] | None, name: str) -> str:
    return f"{values[name]:.1f}" if values is not None and name in values else "-"
