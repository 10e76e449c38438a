from einops import rearrange
from torch import Tensor, nn

from prism_deco.projectors import PROJECTORS, Projector, square_grid


@PROJECTORS.register("token_merge")
class TokenMerge(Projector):
    """Concatenates each block of neighbouring patches into one visual token, then an MLP."""

    def __init__(self, in_dim: int, out_dim: int, in_grid: tuple[int, int], num_tokens: int, *, hidden_dim: int = 1024):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        if in_grid[0] % self.out_grid[0] or in_grid[1] % self.out_grid[1]:
            raise ValueError(f"token_merge cannot cut the patch grid {in_grid} into {self.out_grid} equal blocks.")
        merged = in_dim * in_grid[0] * in_grid[1] // self.num_tokens
        self.mlp = nn.Sequential(nn.Linear(merged, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))

    def project(self, features: Tensor) -> Tensor:
        (i, j), h = self.out_grid, self.in_grid[0] // self.out_grid[0]
        return self.mlp(rearrange(features, "b (i h j w) d -> b (i j) (h w d)", i=i, j=j, h=h))
