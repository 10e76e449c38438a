"""Matryoshka Multimodal Models (M3, arXiv 2405.17430, section 3): nested average pools, any of which can be used."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from prism_deco.projectors.base import PROJECTORS, square_grid
from prism_deco.projectors.pooling import Pooling
from prism_deco.projectors.windows import average_pool


@PROJECTORS.register("matryoshka")
class Matryoshka(Pooling):
    """`avgpool`, trained for several numbers of visual tokens at once: a step's loss is the mean over all of them.

    So every number costs training a pass through the LLM, and, without `trainer.feature_cache`, one through the tower.
    Which one a trained model uses is free: `prism-deco evaluate RUN num_tokens=36`. Reference: mu-cai/matryoshka-mm
    `llava/model/llava_arch.py` (`matryoshka_vis_token_process`), which pools behind the MLP; its numbers are 576, 144,
    36, 9 and 1.

    Args:
        num_tokens: the largest number of visual tokens, a square.
        coarser: the other ones, squares, as far as they are smaller; None halves the side until one is left (12, 6, 3,
            1).
        mlp_depth, mlp_ratio: as for `avgpool`.
        after_mlp: pool what the MLP makes of each patch, instead of the patches.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        coarser: Sequence[int] | None = None,
        mlp_depth: int = 2,
        mlp_ratio: float | None = None,
        after_mlp: bool = True,
    ):
        mlp = {"mlp_depth": mlp_depth, "mlp_ratio": mlp_ratio}
        super().__init__(in_dim, out_dim, in_grid, num_tokens, after_mlp=after_mlp, **mlp)  # type: ignore[arg-type]
        if coarser is None:
            side = self.out_grid[0]
            coarser = [(side >> halvings) ** 2 for halvings in range(1, side.bit_length())]
        for number in coarser:
            square_grid(number, in_grid)
        self.scales += tuple(number for number in coarser if number < self.num_tokens)

    def project_to(self, features: Tensor, num_tokens: int) -> Tensor:
        """float[B, N, in_dim] -> float[B, num_tokens, out_dim]."""
        side = math.isqrt(num_tokens)
        if self.after_mlp:
            features = self.mlp(features)
        pooled = average_pool(features, self.in_grid, (side, side))
        return pooled if self.after_mlp else self.mlp(pooled)
