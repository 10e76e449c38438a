"""PruMerge (arXiv 2403.15388): keeps the patches that the class token attends to, and merges similar ones into them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from prism_deco.evaluation.compressors.base import COMPRESSORS, TowerCompressor, rest_of, take


@COMPRESSORS.register("prumerge")
class PruMerge(TowerCompressor):
    """Keeps the patches with the most attention and adds to each the 32 patches with the most similar keys, weighted by
    their attention; a last token is the weighted sum of all patches that were not kept.

    Reference: 42Shawn/LLaVA-PruMerge `llava/model/multimodal_encoder/clip_encoder.py` (`token_prune_merge_advanced`),
    with its fixed ratio of tokens: its other criterion, the number of outliers, differs between images, and tables
    compare equal numbers of tokens. As there, attention is computed with all channels as one head, and tokens are in
    the order of their attention. The reference uses the tower's last block, which is not loaded here; this uses the
    block whose output is projected. For a tower without a class token, it uses the mean attention that a patch
    receives, as VisionZip does; the paper only has CLIP.
    """

    least = 2
    neighbours = 32

    def merge(self, features: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, M, D]."""
        one_head = "b h l d -> b 1 l (h d)"
        queries, keys = rearrange(queries, one_head), rearrange(keys, one_head)
        # [B, N]: the attention to each patch.
        weights = self.attention(queries, keys)[:, 0]
        weighted = features * weights[..., None].to(features.dtype)
        kept = weights.topk(self.num_tokens - 1, dim=1).indices
        directions = F.normalize(self.patches(keys)[:, 0], dim=-1)
        # [B, kept, N]: cosine similarity of keys.
        similar = take(directions, kept) @ directions.mT
        similar = similar.scatter(2, kept[..., None], -torch.inf)  # a patch is no neighbour of its own
        nearest = similar.topk(min(self.neighbours, features.shape[1] - 1), dim=2).indices
        neighbours = torch.zeros_like(similar, dtype=features.dtype).scatter(2, nearest, 1.0)  # [B, kept, N], 0 or 1
        left_out = take(weighted, rest_of(kept, features.shape[1])).sum(dim=1, keepdim=True)
        return torch.cat([take(features, kept) + neighbours @ weighted, left_out], dim=1)
