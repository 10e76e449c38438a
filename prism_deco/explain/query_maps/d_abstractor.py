"""D-Abstractor: the relevance rules, with deformable attention written as an equivalent dense attention.

What a query samples is linear in the patches' values: with values v_n and samples o_m of one head,
o_m = sum_n A[m, n] v_n for a matrix A determined by the sampling locations and weights. A is the effective
attention, and its gradient follows from that of the samples: dy/dA[m, n] = <dy/do_m, v_n>.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from prism_deco.explain.attention import batched_gradients
from prism_deco.explain.propagate import query_to_patch, weigh
from prism_deco.explain.query_maps.base import Project, outputs_of, trace
from prism_deco.explain.query_maps.maps import QueryMaps, in_parts
from prism_deco.projectors.attention import Sampling, sample
from prism_deco.projectors.d_abstractor import DAbstractor, DecoderLayer
from prism_deco.projectors.windows import shares


def effective_attention(sampling: Sampling, grid: tuple[int, int]) -> Tensor:
    """float[H, M, N]: the weight of each patch in what each head of a query sampled.

    Rows sum to one, minus the weight of samples outside the grid.
    """
    patches, heads = grid[0] * grid[1], sampling.weights.shape[2]
    # Sampling one-hot codes of the patches yields their weights.
    codes = torch.eye(patches, dtype=sampling.weights.dtype, device=sampling.weights.device)
    codes = codes[None, :, None].expand(1, patches, heads, patches)  # [1, N, H, N]: the same codes for every head
    return rearrange(sample(codes, sampling.locations, sampling.weights, grid), "1 m heads n -> heads m n").detach()


@trace.register(DAbstractor)
class DAbstractorMaps(QueryMaps):
    """Queries start with the pooled patches only if those are their content (`query_mode=tgt`); as position embeddings
    they enter queries and keys, but no values."""

    def __init__(self, projector: DAbstractor, project: Project, features: Tensor):
        leaf = features.detach().requires_grad_()
        layers = [cast(DecoderLayer, layer) for layer in cast(nn.ModuleList, projector.layers)]
        modules = [module for layer in layers for module in (layer.self_attention, layer.cross_attention)]
        with torch.enable_grad(), outputs_of(modules) as outputs:
            self.tokens = project(leaf)
        # In each layer self-attention runs before cross-attention, so their outputs alternate.
        self.probabilities: list[Tensor] = [extra for _, extra in outputs[0::2]]
        self.samplings: list[Sampling] = [extra for _, extra in outputs[1::2]]
        self.effective = [effective_attention(sampling, projector.in_grid) for sampling in self.samplings]
        self.start = torch.zeros_like(self.effective[0][0])
        if projector.pooled_is_content:
            self.start = shares(projector.in_grid, projector.out_grid).to(self.start)

    def relevance(self, gradients: Tensor) -> Tensor:
        return in_parts(self._relevance, gradients, sum(a.numel() for a in (*self.probabilities, *self.effective)))

    def _relevance(self, gradients: Tensor) -> Tensor:
        nodes = [*self.probabilities, *(sampling.sampled for sampling in self.samplings)]
        # Gradients in the order of the nodes: first of all self-attentions, then of all samples.
        taken = batched_gradients(self.tokens, nodes, gradients[:, None])
        steps: list[tuple[str, Tensor]] = []
        for k, (probabilities, sampling) in enumerate(zip(self.probabilities, self.samplings, strict=True)):
            steps.append(("self", weigh(probabilities.detach()[0], taken[k][:, 0])))
            by_sample = taken[len(self.probabilities) + k][:, 0]
            # dy/dA from dy/do, as in the module's docstring.
            by_effective = einsum(by_sample, sampling.values.detach()[0], "t m heads e, n heads e -> t heads m n")
            steps.append(("cross", weigh(self.effective[k], by_effective)))
        return query_to_patch(steps, start=self.start.expand(len(gradients), -1, -1))

    def attention(self) -> Tensor:
        """float[M, N]: the last layer's, as for the other projectors."""
        return self.effective[-1].mean(dim=0)
