"""What `bench cache` found: per model predicted and measured ratios, a table and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from prism_deco.bench.measure import Usage
from prism_deco.plan.features import CachePlan

CLOCKS = ("seconds", "cpu_seconds")

MANY = 10_000
"""`auto` leaves runs alone that are over in seconds, as the measured ones are: it is asked about so many times more
images."""


@dataclass(frozen=True)
class Way:
    """One way to train, measured: a number per round, which shows every image once.

    Attributes:
        loading: reading and preparing what a step needs, with no other processes to do it.
        computing: the steps themselves.
    """

    loading: list[Usage]
    computing: list[Usage]

    def times(self, clock: str, *, loading: bool = True) -> list[float]:
        """Each round's time."""
        rounds = zip(self.loading, self.computing, strict=True)
        return [getattr(c, clock) + (getattr(r, clock) if loading else 0.0) for r, c in rounds]


@dataclass(frozen=True)
class Result:
    """A model, measured.

    Attributes:
        shape: what was measured.
        plan: what `prism-deco plan` knows of it, for `shape["images"]` images that are shown once per run.
        build: computing the features of all images.
        open: verifying the cache and opening it.
        difference: relative, between the two ways' losses of one batch.
    """

    name: str
    shape: dict[str, Any]
    plan: CachePlan
    live: Way
    cached: Way
    build: Usage
    open: Usage
    difference: float

    def predicted(self, shown: float | None) -> float:
        """Time of training on a cache as a share of the time without, by the arithmetic.

        Args:
            shown: how often an image is shown, over all runs that share the cache; None: it is there already.
        """
        return self.plan.ratio(to_build=round(self.plan.images / shown) if shown else 0)

    def measured(self, shown: float | None, clock: str, *, loading: bool = True) -> tuple[float, float, float]:
        """The same by the clock: median, least and largest of rounds timed side by side.

        Args:
            clock: seconds | cpu_seconds.
            loading: count what loader processes would do beside the training; else the steps alone.
        """
        built = getattr(self.build, clock) / shown if shown else 0.0
        live, cached = (way.times(clock, loading=loading) for way in (self.live, self.cached))
        ratios = [(theirs + built) / mine for mine, theirs in zip(live, cached, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def render(results: Sequence[Result], shown: float) -> Table:
    """A line per model."""
    about = results[0].shape
    table = Table(
        title=f"Steps on cached features, as a share of live ones ({about['hardware']}, {about['threads']} threads)",
        caption=f"An image is shown {shown:g} times, the build included; or the cache is there. Predicted: by the "
        "arithmetic. Measured: processor time, median of rounds timed side by side (least-largest), with decoding and "
        "reading, and the steps alone.",
    )
    table.add_column("model")
    for header in ("towers", "shown", "predicted", "measured", "steps alone", "auto"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        for times in (shown, None):
            table.add_row(
                result.name,
                f"{result.plan.tower_share:.0%}",
                "there" if times is None else f"{times:g} x",
                f"{result.predicted(times):.2f}",
                _range(result.measured(times, "cpu_seconds")),
                _range(result.measured(times, "cpu_seconds", loading=False)),
                "on" if _auto(result, times) else "off",
            )
    return table


def as_json(results: Sequence[Result], shown: float) -> list[dict[str, Any]]:
    """All numbers, and the ratios made of them."""
    content = []
    for result in results:
        ratios = [
            {
                "shown": times,
                "auto": "on" if _auto(result, times) else "off",
                "predicted": result.predicted(times),
                **{f"measured {clock}": result.measured(times, clock) for clock in CLOCKS},
                **{f"steps alone {clock}": result.measured(times, clock, loading=False) for clock in CLOCKS},
            }
            for times in (shown, None)
        ]
        content.append({"tower_share": result.plan.tower_share, "ratios": ratios} | asdict(result))
    return content


def write(results: Sequence[Result], shown: float, path: Path) -> None:
    """The same as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(results, shown), indent=1) + "\n", encoding="utf-8")


def _auto(result: Result, shown: float | None) -> bool:
    """Whether a run that shows many more such images would use a cache by itself."""
    plan = result.plan
    large = replace(plan, images=MANY * plan.images, visits=MANY * plan.visits, flops=MANY * plan.flops)
    return large.pays(to_build=round(large.images / shown) if shown else 0)


def _range(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
