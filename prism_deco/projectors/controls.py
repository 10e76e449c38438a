"""Controls for comparisons at equal numbers of visual tokens: trivial compression, then the MLP of `linear`.

A fourth control needs no projector: an image small enough that the tower yields that many patches, for example
`projector=linear backbone.image_size=168` (12 x 12 patches of 14 px).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_deco.projectors.base import PROJECTORS
from prism_deco.projectors.pooling import Pooling
from prism_deco.projectors.windows import bilinear_matrix, centre_matrix


@PROJECTORS.register("bilinear")
class Bilinear(Pooling):
    """The feature map resized bilinearly, without antialiasing: of a large window, only the middle 2x2 patches count.

    With `after_mlp=true` this is what LLaVA-OneVision does to video frames (arXiv 2408.03326; transformers
    `llava_onevision/modeling_llava_onevision.py`, `apply_pooling`).
    """

    matrix = staticmethod(bilinear_matrix)


@PROJECTORS.register("every_kth")
class EveryKth(Pooling):
    """The middle patch of each window of `avgpool`: every k-th patch of every k-th row."""

    matrix = staticmethod(centre_matrix)


@PROJECTORS.register("random_patches")
class RandomPatches(Pooling):
    """Patches drawn without replacement, kept in row-major order; each image always gets the same ones.

    An image's features seed its draw, so kernels that round differently may draw differently for a few images.
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
        # float32 and bfloat16 features give the same bits; only four channels, so that rounding seldom flips one.
        # The mask makes the sign-extended numbers positive.
        bits = features[:, patches // 2, :4].detach().bfloat16().view(torch.int16).long() & 0xFFFF
        seed = torch.zeros_like(bits[:, 0])
        for channel in bits.unbind(dim=1):
            seed = _hash(seed ^ channel)
        scores = _hash(seed[:, None] ^ _hash(torch.arange(patches, device=features.device)))
        # The patches with the smallest scores, back in row-major order.
        return scores.argsort(dim=1)[:, : self.num_tokens].sort(dim=1).values

    def pool_patches(self, features: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, M, D]."""
        return features.take_along_dim(self.chosen(features)[..., None], dim=1)

    def query_to_patch(self) -> None:
        """None: it depends on the image (see `explain.query_maps.chosen`)."""
        return None


def _hash(number: Tensor) -> Tensor:
    """A bijective integer hash on 0 .. 2^32-1 (int64). Torch's generators have one seed per batch, not per image."""
    for _ in range(2):
        # 32 times 27 bits fit into int64.
        number = ((number >> 16) ^ number) * 0x45D9F3B & 0xFFFFFFFF
    return (number >> 16) ^ number
