"""Query-to-Patch maps: the interface, and the maps that the geometry fixes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

FLOATS = 64 * 2**20
"""Limit on the elements of a map's intermediate results; more targets or patches are processed in parts."""


class QueryMaps(ABC):
    """How the M visual tokens of one image depend on its N patches.

    Attributes:
        tokens: float[1, M, E], the visual tokens.
    """

    tokens: Tensor

    @abstractmethod
    def relevance(self, gradients: Tensor) -> Tensor:
        """Query-to-Patch relevance.

        Args:
            gradients: float[T, M, E], of T targets' logits with respect to the visual tokens.

        Returns:
            float[M, N], or float[T, M, N] if it depends on the target.
        """

    @abstractmethod
    def attention(self) -> Tensor:
        """float[M, N]: the same without gradients, for comparison."""


class Fixed(QueryMaps):
    """Maps that do not depend on the image: `linear`, `avgpool`."""

    def __init__(self, tokens: Tensor, shares: Tensor):
        self.tokens = tokens
        self.shares = shares

    def relevance(self, gradients: Tensor) -> Tensor:
        return self.shares

    def attention(self) -> Tensor:
        return self.shares


def in_parts(relevance: Callable[[Tensor], Tensor], gradients: Tensor, per_target: int) -> Tensor:
    """`relevance`, float[T, M, E] -> float[T, M, N], of as many targets at a time as fit `FLOATS`."""
    # `per_target` counts the elements of one target's intermediate results.
    return torch.cat([relevance(part) for part in gradients.split(max(1, FLOATS // per_target))])
