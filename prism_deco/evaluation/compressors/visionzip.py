"""VisionZip (arXiv 2412.04467): keeps the patches that the tower attends to, and merges the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prism_deco.errors import UsageError
from prism_deco.evaluation.compressors.base import COMPRESSORS, TowerCompressor, rest_of, take
from prism_deco.vlm import VLM


@COMPRESSORS.register("visionzip")
class VisionZip(TowerCompressor):
    """Dominant tokens are the patches with the most attention, summed over heads. Contextual tokens come from the
    others: evenly spaced ones are targets, and each remaining one is merged into the target with the most similar keys.

    Reference: dvlab-research/VisionZip `visionzip/clip_encoder.py`, for CLIP; for towers without a class token, the
    paper (section 3.2) uses the mean attention that a patch receives. As in the reference, a contextual token is the
    sum of its target and the mean of the patches merged into it, not the mean of all. The reference also keeps the
    class token as a dominant token; this does not, since the projector was trained on patches alone.

    Args:
        contextual: number of contextual tokens among `num_tokens`; None is 10 of 64, the paper's share.
    """

    least = 2

    def __init__(self, vlm: VLM, num_tokens: int, *, contextual: int | None = None):
        self.contextual = max(1, round(num_tokens * 10 / 64)) if contextual is None else contextual
        if type(self.contextual) is not int or not 1 <= self.contextual < max(num_tokens, self.least):
            raise UsageError(f"compressor.contextual={contextual} must be a whole number from 1 to {num_tokens - 1}.")
        super().__init__(vlm, num_tokens)

    def merge(self, features: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, M, D]: dominant tokens in the patches' order, then contextual ones."""
        patches = features.shape[1]
        scores = self.attention(queries, keys).sum(dim=1)
        dominant = scores.topk(self.num_tokens - self.contextual, dim=1).indices.sort(dim=1).values
        others = rest_of(dominant, patches)
        # Keys averaged over heads, of the others only: [B, others, d].
        metric = F.normalize(take(self.patches(keys).mean(dim=1), others), dim=-1)
        features_of_others = take(features, others)
        # Every step-th of the others is a target; the rest are merged into the most similar target.
        step = max(1, others.shape[1] // self.contextual)
        chosen = torch.arange(self.contextual, device=features.device) * step
        merged = rest_of(chosen[None], others.shape[1])[0]
        target = (metric[:, merged] @ metric[:, chosen].mT).argmax(dim=-1)
        share = F.one_hot(target, self.contextual).to(features.dtype)
        # Each column sums to one, so that a target gets the mean of its patches; without any, it gets zero.
        share = share / share.sum(dim=1, keepdim=True).clamp(min=1)
        contextual = features_of_others[:, chosen] + share.mT @ features_of_others[:, merged]
        return torch.cat([take(features, dominant), contextual], dim=1)
