"""Dataclass fields with the values that they allow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers within bounds."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items() if math.isfinite(bound))


def number(default: Any, **bounds: float) -> Any:
    """A field for a number, or a list of numbers, within the bounds of a `Range`."""
    return field(default=default, metadata={"allowed": Range(**bounds)})


def one_of(names: tuple[str, ...], default: Any) -> Any:
    """A field for one of these names."""
    return field(default=default, metadata={"allowed": names})
