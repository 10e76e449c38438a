"""Space to depth, then an MLP: InternVL (arXiv 2404.16821), Idefics3 (2408.12637), Qwen2-VL (2409.12191)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from prism_deco.errors import UsageError
from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import build_mlp
from prism_deco.projectors.windows import cut_windows, shares, window_patches


@PROJECTORS.register("pixel_shuffle")
class PixelShuffle(Projector):
    """Concatenates the channels of a window's patches into one visual token.

    The default is InternVL's (`mlp1` and `pixel_shuffle` of OpenGVLab/InternVL `modeling_internvl_chat.py`). Qwen2-VL's
    merger (transformers `qwen2_vl/modeling_qwen2_vl.py`, `PatchMerger`) is `norm=patch mlp_ratio=1`. Idefics3 and
    nanoVLM (transformers `idefics3/modeling_idefics3.py`; huggingface/nanoVLM `models/modality_projector.py`) are
    `norm=null mlp_depth=1 mlp_bias=false`. All of them need windows of equal size; here, windows are those of
    `avgpool`, and smaller ones are padded with zeros.

    Args:
        norm: LayerNorm over the channels of a `window` or of each `patch`, before the MLP; None: no norm.
        mlp_depth: linear layers of the MLP.
        mlp_ratio: width of its first hidden layer as a multiple of a window's channels; None takes `out_dim`.
        mlp_bias: whether its linear layers have biases.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        norm: str | None = "window",
        mlp_depth: int = 2,
        mlp_ratio: float | None = None,
        mlp_bias: bool = True,
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        if norm not in ("window", "patch", None):
            raise UsageError(f"norm={norm!r} is unknown: choose window, patch or null.")
        # Patches along each side of the largest window; smaller ones are padded to it.
        rows, columns = (window_patches(*sides).shape[1] for sides in zip(in_grid, self.out_grid, strict=True))
        merged = rows * columns * in_dim
        self.patch_norm = nn.LayerNorm(in_dim, eps=1e-6) if norm == "patch" else nn.Identity()
        self.window_norm = nn.LayerNorm(merged) if norm == "window" else nn.Identity()
        self.mlp = build_mlp(merged, out_dim, mlp_depth, ratio=mlp_ratio, bias=mlp_bias)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        windows, _ = cut_windows(self.patch_norm(features), self.in_grid, self.out_grid)
        return self.mlp(self.window_norm(rearrange(windows, "b m k d -> b m (k d)")))

    def query_to_patch(self) -> Tensor:
        """float[M, N]: 1/|window| inside a visual token's window, 0 elsewhere, regardless of the weights."""
        return shares(self.in_grid, self.out_grid)
