"""One side of a contrast: the cells that have its labels, and what was measured on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from prism_deco.errors import UsageError
from prism_deco.report.cells import Cell
from prism_deco.report.stats import seed_interval
from prism_deco.training.status import THROUGH

_BLIND = "recipe.blind"


@dataclass(frozen=True)
class Side:
    """Cells that differ in their seed alone.

    Attributes:
        labels: by which they were chosen.
        cells: by seed.
        values: by seed, where there is one.
        unlike: whether the other side has another number of visual tokens.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, Cell] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    unlike: bool = False

    @property
    def name(self) -> str:
        """The projector, with its visual tokens where they are what differs."""
        # A part may be of one projector, which its labels need not repeat.
        name = self.labels.get("projector") or next((cell.projector for cell in self.cells.values()), "?")
        name = "blind" if _is_blind(self.labels) else name
        asked = next((self.labels[key] for key in self.labels if key.endswith(".num_tokens")), None)
        tokens = self.tokens or asked
        return f"{name} ({tokens})" if tokens and (self.unlike or asked) else name

    @property
    def tokens(self) -> int | None:
        return next((cell.tokens for cell in self.cells.values() if cell.tokens), None)

    @property
    def mean(self) -> float | None:
        return fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None unless there are two."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    def missing(self, planned: Sequence[str]) -> list[str]:
        """Which of the planned seeds have no value and why."""
        if not self.cells:
            return [f"no cell has the labels {words(self.labels)}"]
        reasons: dict[str, list[str]] = {}
        for seed in planned:
            if seed not in self.values:
                reasons.setdefault(_state(self.cells.get(seed)), []).append(seed)
        return [f"{self.name}: seed {', '.join(seeds)} {reason}" for reason, seeds in reasons.items()]

    def is_above(self, floor: Side) -> bool | None:
        """Whether it is above another one by more than the seeds leave open; None with fewer than two common seeds."""
        gains = [value - floor.values[seed] for seed, value in self.values.items() if seed in floor.values]
        return seed_interval(gains)[0] > 0 if len(gains) > 1 else None


def choose(cells: Sequence[Cell], labels: Mapping[str, str], read: Callable[[Cell], float | None], of: str) -> Side:
    """The side of the cells that have these labels; those trained blind only where the labels say so.

    Args:
        of: the claim, for the error.

    Raises:
        UsageError: several cells of one seed have them.
    """
    wanted = {key: value for key, value in labels.items() if key != _BLIND}
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.blind == _is_blind(labels) and all(cell.labels.get(key) == value for key, value in wanted.items()):
            if cell.seed in found:
                raise UsageError(
                    f"The claim {of!r} means either {found[cell.seed].id} or {cell.id}: both have the labels "
                    f"{words(labels)}. Add a label that tells them apart."
                )
            found[cell.seed] = cell
    return Side(labels, found, values(found.values(), read))


def values(cells: Iterable[Cell], read: Callable[[Cell], float | None]) -> dict[str, float]:
    """By seed, where there is a value."""
    return {cell.seed: value for cell in cells if (value := read(cell)) is not None}


def words(labels: Mapping[str, str]) -> str:
    """Labels as on a command line."""
    return " ".join(f"{key}={value}" for key, value in labels.items())


def _is_blind(labels: Mapping[str, str]) -> bool:
    return labels.get(_BLIND, "").lower() == "true"


def _state(cell: Cell | None) -> str:
    """Why a cell has no value."""
    if cell is None:
        return "not planned"
    return "not measured" if cell.state in THROUGH else cell.state
