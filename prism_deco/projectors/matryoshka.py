"""Matryoshka Multimodal Models (M3, arXiv 2405.17430, section 3): nested average pools to choose from."""

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

    Each number therefore costs a training step one pass through the LLM and, without `trainer.feature_cache`, one
    through the tower. A trained model can use any of them: `prism-deco evaluate RUN num_tokens=36`. Reference:
    mu-cai/matryoshka-mm `llava/model/llava_arch.py` (`matryoshka_vis_token_process`), which pools after the MLP to 576,
    144, 36, 9 and 1 tokens.

    Args:
        num_tokens: the largest number of visual tokens, a square.
        coarser: the other numbers, squares; larger ones are ignored. None halves the side down to 1 (12, 6, 3, 1).
        mlp_depth, mlp_ratio, after_mlp: see `Pooling`.
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
        super().__init__(
            in_dim, out_dim, in_grid, num_tokens, mlp_depth=mlp_depth, mlp_ratio=mlp_ratio, after_mlp=after_mlp
        )
        if coarser is None:
            side = self.out_grid[0]
            coarser = [(side >> halvings) ** 2 for halvings in range(1, side.bit_length())]
        for number in coarser:
            square_grid(number, in_grid)  # for its checks
        self.scales += tuple(number for number in coarser if number < self.num_tokens)

    def project_to(self, features: Tensor, num_tokens: int) -> Tensor:
        side = math.isqrt(num_tokens)
        if self.after_mlp:
            features = self.mlp(features)
        pooled = average_pool(features, self.in_grid, (side, side))
        return pooled if self.after_mlp else self.mlp(pooled)
