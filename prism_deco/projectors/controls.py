"""Controls for a comparison at equal numbers of visual tokens: what costs no thought, then the MLP of `linear`.

A fourth is no projector: an image so small that the tower gives that many patches, as with `projector=linear
backbone.image_size=168` (12 x 12 patches of 14 px).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_deco.projectors.base import PROJECTORS
from prism_deco.projectors.pooling import Pooling
from prism_deco.projectors.windows import bilinear_matrix, centre_matrix


@PROJECTORS.register("bilinear")
class Bilinear(Pooling):
    """The feature map resized bilinearly, without antialiasing: of a large window, only its 2x2 patches in the middle
    count. With `after_mlp=true` this is what LLaVA-OneVision does to the frames of a video (arXiv 2408.03326;
    transformers `llava_onevision/modeling_llava_onevision.py`, `apply_pooling`)."""

    matrix = staticmethod(bilinear_matrix)


@PROJECTORS.register("every_kth")
class EveryKth(Pooling):
    """The patch in the middle of each window of `avgpool`: every k-th of a row and of a column."""

    matrix = staticmethod(centre_matrix)


@PROJECTORS.register("random_patches")
class RandomPatches(Pooling):
    """Patches drawn without replacement, in row-major order: an image's own, and the same whenever it is seen.

    The features of an image seed its draw. Kernels that round differently may draw differently for a few images.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        mlp_depth: int = 2,
        mlp_ratio: float | None = None,
    ):
        super().__init__(in_dim, out_dim, in_grid, num_tokens, mlp_depth=mlp_depth, mlp_ratio=mlp_ratio)

    def chosen(self, features: Tensor) -> Tensor:
        """float[B, N, D] -> int64[B, M], increasing: the patches of each image that become visual tokens."""
        patches = features.shape[1]
        # The same bits for float32 features and for those in bfloat16, and few, so that noise seldom changes one.
        bits = features[:, patches // 2, :4].detach().bfloat16().view(torch.int16).long() & 0xFFFF
        seed = torch.zeros_like(bits[:, 0])
        for channel in bits.unbind(dim=1):
            seed = _hash(seed ^ channel)
        scores = _hash(seed[:, None] ^ _hash(torch.arange(patches, device=features.device)))
        return scores.argsort(dim=1)[:, : self.num_tokens].sort(dim=1).values

    def pool_patches(self, features: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, M, D]."""
        return features.take_along_dim(self.chosen(features)[..., None], dim=1)

    def query_to_patch(self) -> None:
        """It is the image's own: `explain.query_maps.chosen`."""
        return None


def _hash(number: Tensor) -> Tensor:
    """Scatters int64 over 0 .. 2^32-1, no two to the same. (Torch's generators draw for a batch, not for an image.)"""
    for _ in range(2):
        number = ((number >> 16) ^ number) * 0x45D9F3B & 0xFFFFFFFF
    return (number >> 16) ^ number
