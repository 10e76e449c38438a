"""The vision backbone interface, and how a backbone is built from its YAML."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prism_deco.backbones.transforms import BackboneTransform
from prism_deco.config import load_choice
from prism_deco.config.registry import Registry
from prism_deco.errors import UsageError
from prism_deco.tensors import base_name, full, is_adapter


class VisionBackbone(nn.Module):
    """One or more vision towers, frozen unless a recipe trains them: pixels in, patch features out.

    Attributes:
        towers: names of the towers, the keys of the pixel dictionaries.
        image_size: side of the square input in pixels (of the first tower).
        patch_size: side of a patch in those pixels.
        grid: patch grid (height, width); features come in row-major order.
        embed_dim: channels D of a patch feature.
        transform: PIL image -> dict[tower, float32[3, S, S]]; `transform.frame(size)` maps coordinates.
        blocks: the transformer blocks in order of execution, the units of sharding and activation checkpointing.
        trained: whether weights, or adapters on them, are trained.
    """

    towers: tuple[str, ...]
    image_size: int
    patch_size: int
    grid: tuple[int, int]
    embed_dim: int
    transform: BackboneTransform
    trained: bool = False

    @property
    def num_patches(self) -> int:
        """Number N of patch features per image."""
        return self.grid[0] * self.grid[1]

    @property
    def blocks(self) -> list[nn.Module]:
        raise NotImplementedError

    def features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """dict[tower, float[B, 3, S, S]] -> float[B, N, D]."""
        raise NotImplementedError

    def forward(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """dict[tower, float[B, 3, S, S]] -> float[B, N, D], in the dtype of the weights.

        Raises:
            UsageError: the pixels of a tower are missing.
        """
        missing = [name for name in self.towers if name not in pixels]
        if missing:
            raise UsageError(
                f"No pixels for the towers {', '.join(missing)} (there are: {', '.join(pixels) or 'none'}). "
                "Prepare images with the backbone's own transform."
            )
        return self.features(pixels)

    def blank(self, device: torch.device) -> dict[str, Tensor]:
        """An all-zero image, float32[1, 3, S, S] per tower."""
        towers = self.transform.towers.items()
        return {name: torch.zeros(1, 3, t.image_size, t.image_size, device=device) for name, t in towers}

    def tail(self, layers: int | None) -> list[nn.Module]:
        """The last `layers` blocks of each tower, after which nothing has weights; None is the whole backbone."""
        if layers is None:
            return [self]
        if layers > len(self.blocks):
            raise UsageError(
                f"recipe.tower_layers={layers}: {self.towers[0]} has {len(self.blocks)} blocks up to the layer whose "
                "features are used. Choose fewer, or null, which also trains its embeddings."
            )
        return self.blocks[-layers:]

    def train(self, mode: bool = True) -> VisionBackbone:
        """A frozen tower stays in evaluation mode, whatever the mode of the model around it."""
        return super().train(mode and self.trained)

    def sha256(self) -> str:
        """Hash of the current weights without adapters: names, dtypes, shapes and bytes, sorted by name.

        All processes of a sharded tower must call it.
        """
        digest = hashlib.sha256()
        state = {base_name(name): tensor for name, tensor in self.state_dict().items() if not is_adapter(name)}
        for name, tensor in sorted(state.items()):
            tensor = full(tensor).detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


BACKBONES: Registry[type[VisionBackbone]] = Registry("backbone family", package="prism_deco.backbones")


def build_backbone(
    choice: str | Mapping[str, Any],
    *,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    image_size: int | None = None,
    **options: Any,
) -> VisionBackbone:
    """Builds a frozen backbone.

    Args:
        choice: name of a YAML in `conf/backbone`, or its content as a mapping. Its `family` picks the class.
        pretrained: load weights, unless the choice says `pretrained: false`.
        device: where the weights live; "meta" (with `pretrained=False`) builds shapes only.
        image_size: side of the input in pixels, overriding the choice's; position tables are resampled.
        options: override keys of the choice (`weights`, `layer`, `resize` or the family's own).

    Raises:
        UsageError: unknown names; weights are missing or do not fit.
    """
    content = dict(load_choice("backbone", choice) if isinstance(choice, str) else choice) | options
    family = content.pop("family")
    content["pretrained"] = pretrained and content.get("pretrained", True)
    if image_size is not None:
        content["image_size"] = image_size
    if content["pretrained"] and device is not None and torch.device(device).type == "meta":
        raise UsageError("Weights cannot be loaded on the meta device: build with pretrained=False.")
    return BACKBONES.build(family, device=device, **content)
