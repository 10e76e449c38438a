"""Attention within windows: one cross-attention, in which each query sees only the patches of its window."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_deco.explain.attention import batched_gradients
from prism_deco.explain.propagate import weigh
from prism_deco.explain.query_maps.base import Project, outputs_of, trace
from prism_deco.explain.query_maps.maps import QueryMaps, in_parts
from prism_deco.projectors.token_packer import TokenPacker
from prism_deco.projectors.window_attention import MeanQueryPooling
from prism_deco.projectors.windows import cut_windows


@trace.register(MeanQueryPooling)
@trace.register(TokenPacker)
class WindowAttentionMaps(QueryMaps):
    """Queries start without patches: the patches they are pooled from enter attention scores, but no values."""

    def __init__(self, projector: MeanQueryPooling | TokenPacker, project: Project, features: Tensor):
        leaf = features.detach().requires_grad_()
        with torch.enable_grad(), outputs_of([projector.attention]) as outputs:
            self.tokens = project(leaf)
        ((_, self.probabilities),) = outputs
        self.patches = features.shape[1]
        # The patches' numbers, cut like their features, tell which patch each key of a window is: int64[M, K].
        numbers = torch.arange(self.patches, dtype=torch.float64, device=features.device)[None, :, None]
        # Padding has zero weight, so its number does not matter.
        cut, _ = cut_windows(numbers, projector.in_grid, projector.out_grid)
        self.numbers = cut[0, ..., 0].long()

    def relevance(self, gradients: Tensor) -> Tensor:
        return in_parts(self._relevance, gradients, self.probabilities.numel() + gradients.shape[1] * self.patches)

    def _relevance(self, gradients: Tensor) -> Tensor:
        (taken,) = batched_gradients(self.tokens, [self.probabilities], gradients[:, None])
        return self._spread(weigh(self.probabilities.detach()[0], taken[:, 0]))

    def attention(self) -> Tensor:
        return self._spread(self.probabilities.detach()[0].mean(dim=0))

    def _spread(self, weighed: Tensor) -> Tensor:
        """float[..., M, K] -> float[..., M, N]."""
        spread = weighed.new_zeros(*weighed.shape[:-1], self.patches)
        return spread.scatter_add(-1, self.numbers.expand_as(weighed), weighed)
