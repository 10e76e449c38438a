"""Perceiver resampler: latents that attend to patches and to each other in one softmax."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prism_deco.explain.attention import batched_gradients, eager_attention
from prism_deco.explain.propagate import weigh
from prism_deco.explain.query_maps.base import Project, outputs_of, trace
from prism_deco.explain.query_maps.maps import QueryMaps, in_parts
from prism_deco.projectors.resampler import Resampler


@trace.register(Resampler)
class ResamplerMaps(QueryMaps):
    """The self-attention rule on patches and latents as one sequence, in which patches stay unchanged: R + A_q R + A_p,
    where A_p and A_q are the attention to patches and to latents."""

    def __init__(self, projector: Resampler, project: Project, features: Tensor):
        leaf = features.detach().requires_grad_()
        body = cast(PreTrainedModel, projector.body)
        with eager_attention(body), torch.enable_grad(), outputs_of(projector.expose_attention()) as outputs:
            self.tokens = project(leaf)
        self.probabilities: list[Tensor] = [probabilities for _, probabilities in outputs]
        self.patches = features.shape[1]

    def relevance(self, gradients: Tensor) -> Tensor:
        return in_parts(self._relevance, gradients, sum(p.numel() for p in self.probabilities))

    def _relevance(self, gradients: Tensor) -> Tensor:
        taken = batched_gradients(self.tokens, self.probabilities, gradients[:, None])
        relevance = gradients.new_zeros(*gradients.shape[:2], self.patches, dtype=torch.float32)
        for probabilities, gradient in zip(self.probabilities, taken, strict=True):
            weighed = weigh(probabilities.detach()[0], gradient[:, 0])
            # Keys are the patches, then the latents.
            of_patches, of_latents = weighed[..., : self.patches], weighed[..., self.patches :]
            relevance = relevance + of_latents @ relevance.to(weighed) + of_patches
        return relevance

    def attention(self) -> Tensor:
        """float[M, N]: the last layer's, without the attention to latents."""
        return self.probabilities[-1].detach()[0, ..., : self.patches].mean(dim=0)
