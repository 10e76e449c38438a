"""Input x gradient through projectors without attention (C-Abstractor) or of unknown type.

s[t, m, n] = relu( sum_d x[n, d] d<v_m, g_tm>/dx[n, d] ), rows scaled to sum to one: how much of the
target's first-order dependence on visual token v_m (g_tm being the gradient of target t with respect to it)
comes through patch n.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from itertools import product
from typing import cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from prism_deco.explain.propagate import normalise_rows
from prism_deco.explain.query_maps.maps import FLOATS, QueryMaps
from prism_deco.projectors import Projector
from prism_deco.projectors.c_abstractor import CAbstractor
from prism_deco.projectors.windows import average_matrix


class InputGradient(QueryMaps):
    """Reverse mode takes one backward pass per target and visual token (T*M); forward mode takes one derivative per
    patch (N) for all targets and visual tokens together. The cheaper one is used.

    In forward mode, the derivative of all visual tokens along x_n (the features of patch n, zero elsewhere) is
    u[m, n] = sum_d x[n, d] dv_m/dx[n, d], so s[t, m, n] = relu(<u[m, n], g_tm>).
    """

    def __init__(self, projector: Projector, project: Callable[[Tensor], Tensor], features: Tensor):
        with torch.no_grad():
            self.tokens = project(features)
        self.projector = projector
        self.project = project
        self.features = features.detach()

    def relevance(self, gradients: Tensor) -> Tensor:
        dtype = torch.promote_types(gradients.dtype, torch.float32)
        backwards, forwards = gradients.shape[0] * gradients.shape[1], self.features.shape[1]
        # A backward pass costs about twice a forward derivative, as it needs its own forward pass.
        if 2 * backwards <= forwards:
            products = self._backwards(gradients)
        else:
            try:
                products = self._forwards(gradients)
            except NotImplementedError:  # an operator without forward-mode derivative, such as bilinear sampling
                products = self._backwards(gradients)
        return normalise_rows(products.to(dtype).relu())

    def _forwards(self, gradients: Tensor) -> Tensor:
        """float[T, M, E] -> float[T, M, N], before clamping."""
        own = torch.eye(self.features.shape[1], dtype=self.features.dtype, device=self.features.device)
        parts = []
        for chosen in own.split(self._chunk):
            # Tangents [patches, 1, N, D]: a patch's own features in its row, zero elsewhere. Result [patches, 1, M, E].
            along = torch.func.vmap(self._along)(chosen[:, None, :, None] * self.features)
            parts.append(einsum(along[:, 0], gradients, "n m e, t m e -> t m n"))
        return torch.cat(parts, dim=-1)

    def _backwards(self, gradients: Tensor) -> Tensor:
        """float[T, M, E] -> float[T, M, N], before clamping."""
        wanted = list(product(range(gradients.shape[0]), range(gradients.shape[1])))
        rows = []
        for start in range(0, len(wanted), self._chunk):
            # Each pair of a target and a visual token gets its own copy of the features, so that one backward pass
            # keeps the pairs' gradients apart.
            targets, queries = torch.tensor(wanted[start : start + self._chunk], device=gradients.device).T
            copies = self.features.expand(len(targets), -1, -1).clone().requires_grad_()
            with torch.enable_grad():
                chosen = self.project(copies)[torch.arange(len(queries), device=queries.device), queries]  # [pairs, E]
            (slopes,) = torch.autograd.grad(chosen, copies, gradients[targets, queries])
            rows.append((slopes * self.features).sum(dim=-1))  # [pairs, N]
        return rearrange(torch.cat(rows), "(t m) n -> t m n", t=len(gradients))

    @property
    def _chunk(self) -> int:
        """Derivatives per batch, so that their intermediate results fit `FLOATS`."""
        patches, channels = self.features.shape[1:]
        return max(1, FLOATS // (patches * channels * 8 + self.tokens.numel()))

    def attention(self) -> Tensor:
        return normalise_rows(structural_bound(self.projector).to(self.features))

    def _along(self, tangent: Tensor) -> Tensor:
        """float[1, N, D] -> float[1, M, E]: the directional derivative of the visual tokens."""
        return cast(Tensor, torch.func.jvp(self.project, (self.features,), (tangent,))[1])


@singledispatch
def structural_bound(projector: Projector) -> Tensor:
    """float[M, N]: 1 where the geometry lets a patch reach a visual token, 0 elsewhere; all ones if unknown."""
    return torch.ones(projector.num_tokens, projector.in_grid[0] * projector.in_grid[1])


@structural_bound.register
def _(projector: CAbstractor) -> Tensor:
    """Pooling windows, widened by one cell per 3x3 convolution after the pooling and by one patch per convolution
    before it. Squeeze-and-excitation reaches further, but only as one scale per channel."""
    # The numbers of 3x3 convolutions before and after the pooling.
    before, behind = (
        sum(isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3) for part in stage.modules())
        for stage in (cast(nn.Module, projector.stage1), cast(nn.Module, projector.stage2))
    )
    rows, columns = (
        _reach(size, out, before, behind) for size, out in zip(projector.in_grid, projector.out_grid, strict=True)
    )
    return rearrange(einsum(rows, columns, "i h, j w -> i j h w"), "i j h w -> (i j) (h w)")


def _reach(size: int, out: int, before: int, behind: int) -> Tensor:
    """float[out, size]: 1 for the patches along one side that reach each cell."""
    # Bands: 1 where two cells (or patches) are at most `steps` apart, as far as that many 3x3 convolutions reach.
    cells, patches = (
        ((torch.arange(n)[:, None] - torch.arange(n)).abs() <= steps).float()
        for n, steps in ((out, behind), (size, before))
    )
    return (cells @ average_matrix(size, out) @ patches > 0).float()
