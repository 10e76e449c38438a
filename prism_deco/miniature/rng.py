"""Random integers that are the same on every machine and in every version of Python."""

from __future__ import annotations

import random
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Draws from `random.Random.random()`, the only method whose sequence Python promises to keep.

    (`randrange`, `choice` and `shuffle` may change between versions, and so may numpy's generators.)

    Args:
        key: of the stream, for example `(seed, "train", index)`. Different keys give independent streams.
    """

    def __init__(self, *key: object):
        # Python seeds from a string by SHA-512 of its bytes, not by `hash`, which differs between processes.
        self._random = random.Random("/".join(map(str, key))).random

    def below(self, n: int) -> int:
        """A uniform integer in [0, n)."""
        return int(self._random() * n)

    def chance(self, percent: int) -> bool:
        """True with a probability of `percent` / 100."""
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        """A random item."""
        return items[self.below(len(items))]

    def shuffle(self, items: MutableSequence[T]) -> None:
        """Shuffles in place (Fisher-Yates)."""
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
