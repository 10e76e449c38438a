"""Fields of the schema that state which values they take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers within bounds."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)


def number(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field whose value, or each of whose values, is within bounds."""
    return field(default=default, metadata={"allowed": Range(least, above, most, below)})


def one_of(names: tuple[str, ...], default: Any) -> Any:
    """A field whose value is one of these names."""
    return field(default=default, metadata={"allowed": names})
