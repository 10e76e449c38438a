"""Max pooling: a channel's relevance goes to the patch that won it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from prism_deco.explain.attention import batched_gradients
from prism_deco.explain.propagate import normalise_rows
from prism_deco.explain.query_maps.base import Project, outputs_of, trace
from prism_deco.explain.query_maps.maps import QueryMaps
from prism_deco.projectors.pooling import MaxPool


@trace.register(MaxPool)
class MaxPoolMaps(QueryMaps):
    """The fraction of a window's channels that each patch won, channels weighted by |value x gradient|.

    Without gradients all channels have equal weight. Rows sum to one.
    """

    def __init__(self, projector: MaxPool, project: Project, features: Tensor):
        leaf = features.detach().requires_grad_()
        with torch.enable_grad(), outputs_of([cast(nn.Module, projector.pool)]) as outputs:
            self.tokens = project(leaf)
        # float[1, M, D], and int64[1, M, D], the patch that won each channel.
        ((self.values, self.winners),) = outputs
        self.patches = features.shape[1]

    def relevance(self, gradients: Tensor) -> Tensor:
        (by_value,) = batched_gradients(self.tokens, [self.values], gradients[:, None])
        return self._shares((by_value * self.values.detach()).abs()[:, 0])

    def attention(self) -> Tensor:
        return self._shares(torch.ones_like(self.values.detach()))[0]

    def _shares(self, weights: Tensor) -> Tensor:
        """float[T, M, D] -> float[T, M, N]."""
        dtype = torch.promote_types(weights.dtype, torch.float32)
        shares = weights.new_zeros(*weights.shape[:2], self.patches, dtype=dtype)
        # Adds each channel's weight to the patch that won it.
        return normalise_rows(shares.scatter_add_(2, self.winners.expand_as(weights), weights.to(dtype)))
