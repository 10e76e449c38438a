"""A common interface to the vision transformers of timm and open_clip."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import open_clip.transformer
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prism_deco.errors import UsageError


class Trunk(nn.Module):
    """A vision transformer truncated after the last block whose output is used.

    Attributes:
        vit: the library's own module.
        depth: number of blocks before truncation.
        taps: 0-based indices of the blocks whose outputs are used, increasing; the last one is the last block kept.
        image_size: side of the square input in pixels.
        grid: patch grid (height, width).
        patch_size: side of a patch in pixels.
        embed_dim: channels of a token, of all taps together.
        prefix_positions: rows of the position table before those of the patches (class token, registers).

    Args:
        model: the name of `vit`, for messages.
        layers: indices of the blocks to tap; negative ones count from the end.

    Raises:
        UsageError: `vit` is of another class than `kinds`, or has no such layers.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of `vit`; the features of others may not form a patch grid."""

    vit: Any
    image_size: int
    grid: tuple[int, int]
    patch_size: int
    embed_dim: int
    prefix_positions: int

    def __init__(self, vit: nn.Module, model: str, layers: Sequence[int]):
        super().__init__()
        if not isinstance(vit, self.kinds):
            raise UsageError(
                f"backbone.model={model} is a {type(vit).__name__}, whose features cannot be read as a grid of "
                f"patches. Choose a model that is a {' or '.join(kind.__name__ for kind in self.kinds)}."
            )
        self.vit = vit
        self.depth = len(self.blocks)
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise UsageError(
                    f"layer={layer} is outside this tower of {self.depth} blocks: "
                    f"choose {-self.depth} to {self.depth - 1} (-2 is the second-to-last)."
                )
        self.taps = sorted({layer % self.depth for layer in layers})
        if len(self.taps) < len(layers):
            raise UsageError(f"layers={list(layers)} names a block twice: take it out of backbone.extra_layers.")
        # The final norm, pooling, head and the blocks after the last tap would only take memory.
        self.vit.prune_intermediate_layers([self.taps[-1]], prune_norm=True, prune_head=True)

    @property
    def blocks(self) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, N, D]: patch tokens after the tapped blocks, before any norm."""
        taken = self.vit.forward_intermediates(
            pixels, indices=self.taps, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        # open_clip returns a dict, timm a list.
        outputs = taken["image_intermediates"] if isinstance(taken, dict) else taken
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class TimmTrunk(Trunk):
    """timm's VisionTransformer (SigLIP, DINOv2) or Eva (DINOv3, EVA-02, Perception Encoder).

    Args:
        vit: resized to `image_size`, which must be at least that of a patch.
    """

    kinds = (VisionTransformer, Eva)
    vit: VisionTransformer | Eva

    def __init__(self, vit: nn.Module, model: str, image_size: int, layers: Sequence[int]):
        super().__init__(vit, model, layers)
        embed = cast(Any, self.vit.patch_embed)
        check_image_size(image_size, embed.feat_ratio())
        self.vit.set_input_size((image_size, image_size))
        self.image_size = image_size
        self.grid = embed.grid_size
        self.patch_size = embed.feat_ratio()
        self.embed_dim = self.vit.embed_dim * len(self.taps)
        self.prefix_positions = 0 if self.vit.no_embed_class else self.vit.num_prefix_tokens
        self.vit.register_load_state_dict_post_hook(_fill_buffers)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)


def _fill_buffers(vit: nn.Module, _: Any) -> None:
    """Computes buffers that checkpoints lack (rotary frequencies), after weights were loaded into a meta model."""
    device = next((parameter.device for parameter in vit.parameters() if not parameter.is_meta), torch.device("cpu"))
    for module in vit.modules():
        hollow = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in hollow:
            setattr(module, name, torch.empty_like(module.get_buffer(name), device=device))
        if hollow:
            cast(Any, module).init_non_persistent_buffers()


class OpenClipTrunk(Trunk):
    """open_clip's VisionTransformer (CLIP)."""

    kinds = (open_clip.transformer.VisionTransformer,)
    vit: open_clip.transformer.VisionTransformer

    def __init__(self, vit: nn.Module, model: str, layers: Sequence[int]):
        super().__init__(vit, model, layers)
        self.image_size = cast(tuple[int, int], self.vit.image_size)[0]
        self.grid = self.vit.grid_size
        self.patch_size = cast(tuple[int, int], self.vit.patch_size)[0]
        self.embed_dim = self.vit.class_embedding.shape[0] * len(self.taps)
        self.prefix_positions = 1

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.vit.transformer.resblocks)


def check_image_size(image_size: int, patch_size: int) -> None:
    """`UsageError` for an input smaller than a patch."""
    if image_size < patch_size:
        raise UsageError(f"image_size={image_size} is smaller than one patch of {patch_size} px.")


def register_architectures() -> None:
    """Registers the architectures that ship with this package with timm and open_clip."""
    importlib.import_module("prism_deco.miniature.architectures")
