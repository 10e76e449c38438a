"""The interface of training-free compressors, and the base class of those that use the tower's attention.

Shapes: B images, N patches of D channels, L positions of the tower (its class token and registers come first), H heads
of d channels, M visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from prism_deco.backbones.tower import Tower
from prism_deco.backbones.trunks import OpenClipTrunk
from prism_deco.config.registry import Registry
from prism_deco.errors import UsageError
from prism_deco.projectors import Projector
from prism_deco.vlm import VLM

COMPRESSORS: Registry[Callable[..., Any]] = Registry("compressor", package="prism_deco.evaluation.compressors")
"""Called with `vlm` and `num_tokens`, a compressor changes the model in place: it replaces the projector
(`TowerCompressor`), or hooks into the LLM (`fastv`). Score tables print its `note`, if it has one."""


def compress(vlm: VLM, name: str, num_tokens: int, **options: Any) -> None:
    """Reduces the visual tokens of a trained model without training.

    Args:
        vlm: a model whose projector makes one visual token per patch (`linear`); changed in place.
        num_tokens: visual tokens to keep per image.
    """
    COMPRESSORS.get(name)  # an unknown name is refused first
    projector = vlm.projector
    if projector.compresses:
        raise UsageError(
            f"compressor={name} chooses among all patches, and {type(projector).__name__} has merged them already: "
            "name a run of projector=linear."
        )
    if num_tokens >= projector.num_tokens:
        raise UsageError(
            f"compressor={name} num_tokens={num_tokens}: an image has {projector.num_tokens} visual tokens; name fewer."
        )
    COMPRESSORS.build(name, vlm=vlm, num_tokens=num_tokens, **options)


class TowerCompressor(Projector):
    """Selects or merges patches by the tower's own attention, and projects them with the trained projector.

    It replaces the model's projector. Queries and keys are those of the block whose output the projector reads, the
    last one that is loaded.

    Args:
        vlm: the model, changed in place.
        num_tokens: visual tokens M per image, any number.
    """

    least: ClassVar[int] = 1
    """Smallest number of visual tokens."""

    def __init__(self, vlm: VLM, num_tokens: int):
        inner, backbone = vlm.projector, vlm.backbone
        # The tokens no longer form a grid, so they count as a single row.
        super().__init__(inner.in_dim, inner.out_dim, inner.in_grid, (1, num_tokens))
        if num_tokens < self.least:
            raise UsageError(f"num_tokens={num_tokens} is too few: name at least {self.least}.")
        if not isinstance(backbone, Tower):
            raise UsageError(
                f"{', '.join(backbone.towers)}: a compressor reads the attention of one tower, and these are several. "
                "compressor=fastv reads that of the LLM."
            )
        trunk = backbone.trunk
        attention: Any = trunk.blocks[trunk.taps[-1]].attn
        if not isinstance(attention, nn.MultiheadAttention | Attention):
            raise UsageError(
                f"{backbone.towers[0]}: the attention of its blocks ({type(attention).__name__}) cannot be read. "
                "compressor=fastv reads that of the LLM."
            )
        self.inner = inner
        self.heads = attention.num_heads
        self.has_class_token = isinstance(trunk, OpenClipTrunk) or trunk.vit.cls_token is not None
        self._seen: tuple[Tensor, Tensor] | None = None
        attention.register_forward_pre_hook(self._see)
        vlm.projector = self

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim], for the images of the tower's last forward pass."""
        assert self._seen is not None
        queries, keys = self._seen
        self._seen = None
        return self.inner.project(self.merge(features, queries, keys))

    def merge(self, features: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, M, D].

        Args:
            queries, keys: float32[B, H, L, d].
        """
        raise NotImplementedError

    def attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """float32[B, H, N]: the attention of the class token to each patch; without a class token, the mean attention
        of all positions."""
        paid = (queries @ keys.mT * keys.shape[-1] ** -0.5).softmax(dim=-1)
        # [B, H, L, L] with queries as rows -> [B, H, L]; position 0 is the class token.
        row = paid[:, :, 0] if self.has_class_token else paid.mean(dim=2)
        return self.patches(row[..., None])[..., 0]

    def patches(self, positions: Tensor) -> Tensor:
        """Drops the class token and registers: float[B, H, L, d] -> float[B, H, N, d]."""
        height, width = self.in_grid
        return positions[:, :, -height * width :]

    def _see(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """Pre-forward hook that computes and keeps the queries and keys of the block's attention."""
        if isinstance(module, nn.MultiheadAttention):
            both = F.linear(inputs[0], module.in_proj_weight, module.in_proj_bias)
        else:
            both = module.qkv(inputs[0])
        # The projection yields queries, keys and values in this order; values are not needed.
        queries, keys, _ = rearrange(both, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        if isinstance(module, Attention):
            # Identities, unless the tower normalises queries and keys.
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        self._seen = queries.float(), keys.float()


def take(values: Tensor, index: Tensor) -> Tensor:
    """float[B, N, D] -> float[B, K, D]: the rows at the indices int64[B, K]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def rest_of(index: Tensor, size: int) -> Tensor:
    """int64[B, K] -> int64[B, size - K]: the indices below `size` that are not in `index`, in increasing order."""
    free = torch.ones(len(index), size, dtype=torch.bool, device=index.device).scatter(1, index, False)
    # Each row has size - K free indices, and `nonzero` lists them row by row in increasing order.
    return free.nonzero()[:, 1].reshape(len(index), -1)
