"""Beyond R-GAE: from patch features down to the image's patches, through the frozen vision towers.

A tower's tokens are mixed by its self-attention, so a feature is not only about its own patch. The
vector rule continues through the blocks below the tapped one. With several towers, each is followed by
itself, and their maps are averaged: both started from the same patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from einops import einsum, rearrange
from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prism_deco.backbones.tower import Tower
from prism_deco.errors import UsageError
from prism_deco.explain.attention import batched_gradients
from prism_deco.explain.propagate import propagate_row, weigh
from prism_deco.vlm import VLM


@dataclass(frozen=True)
class Probe:
    """Attention of one block, and how its gradients follow from those of a node of the graph."""

    node: Tensor
    """The node to take gradients of."""
    attention: Tensor
    """float[H, n, n]: probabilities."""
    gradient: Callable[[Tensor], Tensor]
    """Gradients of the node, float[T, ...] -> those of the attention, float[T, H, n, n]."""


@singledispatch
@contextmanager
def probe(block: nn.Module, found: list[Probe]) -> Iterator[None]:
    """Appends a block's `Probe` to `found` when it runs inside the context."""
    raise UsageError(f"through_backbone does not know the attention of a {type(block).__name__}: leave it off.")


@probe.register
@contextmanager
def _timm(block: Block, found: list[Probe]) -> Iterator[None]:
    attention: Any = block.attn
    fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel returns no probabilities

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        found.append(Probe(output, output.detach()[0], lambda taken: taken[:, 0]))

    handle = attention.attn_drop.register_forward_hook(keep)  # it takes the probabilities, and changes nothing here
    try:
        yield
    finally:
        handle.remove()
        attention.fused_attn = fused


@probe.register
@contextmanager
def _open_clip(block: ResidualAttentionBlock, found: list[Probe]) -> Iterator[None]:
    """torch's MultiheadAttention hands out probabilities that its output was not computed from: they are
    computed here, and their gradients from those of the output, which is linear in them."""
    module = block.attn

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        x = args[0].detach() if module.batch_first else args[0].detach().transpose(0, 1)
        projected = nn.functional.linear(x[0], module.in_proj_weight, module.in_proj_bias)
        query, key, value = rearrange(
            projected, "n (three heads e) -> three heads n e", three=3, heads=module.num_heads
        )
        scores = einsum(query, key, "heads q e, heads k e -> heads q k") * query.shape[-1] ** -0.5

        def gradient(taken: Tensor) -> Tensor:
            taken = taken[:, 0] if module.batch_first else taken[:, :, 0]
            mixed = rearrange(taken @ module.out_proj.weight, "t q (heads e) -> t heads q e", heads=module.num_heads)
            return einsum(mixed, value, "t heads q e, heads k e -> t heads q k")

        found.append(Probe(output[0], scores.softmax(dim=-1), gradient))

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def through_towers(vlm: VLM, pixels: Mapping[str, Tensor], text_to_patch: Tensor, by_token: Tensor) -> Tensor:
    """Continues relevance from patch features to the image's patches.

    Args:
        pixels: per tower float[1, 3, S, S]; the model must be `frozen`.
        text_to_patch: float[T, N], relevance of the patch features.
        by_token: float[T, M, E], gradients of the targets' logits by the visual tokens.

    Returns:
        float[T, N].
    """
    found: list[Probe] = []
    towers = [module for module in vlm.backbone.modules() if isinstance(module, Tower)]
    leaves = {tower: values.detach().requires_grad_() for tower, values in pixels.items()}
    with ExitStack() as probes, torch.enable_grad():
        for tower in towers:
            for block in tower.blocks:
                probes.enter_context(probe(block, found))
        tokens = vlm.project(vlm.standardise(vlm.backbone(leaves)).to(by_token.dtype))
    taken = batched_gradients(tokens, [p.node for p in found], by_token[:, None])
    weighed = [weigh(p.attention, p.gradient(gradients)) for p, gradients in zip(found, taken, strict=True)]
    patches = text_to_patch.shape[1]
    maps, first = [], 0
    for tower in towers:
        blocks = weighed[first : first + len(tower.blocks)]
        first += len(tower.blocks)
        # Class and register tokens stand before the patches, and the features say nothing of them.
        prefix = blocks[0].shape[-1] - patches
        row = nn.functional.pad(text_to_patch, (prefix, 0))
        for layer in reversed(blocks):
            row = propagate_row(row, layer.to(row.dtype))
        maps.append(row[:, prefix:])
    return torch.stack(maps).mean(dim=0)
