"""What a training-free compressor promises, and the base of those that look at the tower.

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
"""Called with `vlm` and `num_tokens`, a compressor changes the model in place: it looks at the tower and replaces the
projector (`TowerCompressor`), or it looks at the LLM (`fastv`). Tables print its `note`, if it has one."""


def compress(vlm: VLM, name: str, num_tokens: int, **options: Any) -> None:
    """Lets a trained model go on with fewer visual tokens, without training.

    Args:
        vlm: a model whose projector makes one visual token per patch (`linear`); changed in place.
        name: a registered compressor.
        num_tokens: visual tokens that are left of an image.
        options: the compressor's own.

    Raises:
        UsageError: an unknown name or option, a projector that compresses, or a number of tokens, a tower or an LLM
            that the compressor cannot work with.
    """
    COMPRESSORS.get(name)
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
    """Selects or merges patches by the tower's own attention, and projects them as trained.

    It stands in the place of the model's projector. Queries and keys are those of the block whose output the projector
    reads, the last one that is loaded.

    Args:
        vlm: the model, changed in place.
        num_tokens: visual tokens M of an image, any number.
    """

    least: ClassVar[int] = 1
    """Smallest number of visual tokens."""

    def __init__(self, vlm: VLM, num_tokens: int):
        inner, backbone = vlm.projector, vlm.backbone
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
        """float[B, N, in_dim] -> float[B, M, out_dim]: of the images that the tower has seen last."""
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
        """float32[B, H, N]: the attention that the class token pays to each patch; where there is none, what each patch
        receives from all positions on average."""
        paid = (queries @ keys.mT * keys.shape[-1] ** -0.5).softmax(dim=-1)
        row = paid[:, :, 0] if self.has_class_token else paid.mean(dim=2)
        return self.patches(row[..., None])[..., 0]

    def patches(self, positions: Tensor) -> Tensor:
        """float[B, H, L, d] -> float[B, H, N, d]."""
        height, width = self.in_grid
        return positions[:, :, -height * width :]

    def _see(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """Keeps the queries and keys that a block's attention is about to compute."""
        if isinstance(module, nn.MultiheadAttention):
            both = F.linear(inputs[0], module.in_proj_weight, module.in_proj_bias)
        else:
            both = module.qkv(inputs[0])
        queries, keys, _ = rearrange(both, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        if isinstance(module, Attention):
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        self._seen = queries.float(), keys.float()


def take(values: Tensor, index: Tensor) -> Tensor:
    """float[B, N, D] -> float[B, K, D]: the rows that int64[B, K] names."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def rest_of(index: Tensor, size: int) -> Tensor:
    """int64[B, K] -> int64[B, size - K]: the numbers below `size` that it leaves out, increasing."""
    free = torch.ones(len(index), size, dtype=torch.bool, device=index.device).scatter(1, index, False)
    return free.nonzero()[:, 1].reshape(len(index), -1)
