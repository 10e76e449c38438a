"""Several towers side by side, channels concatenated (prismatic's fused DINOv2 + SigLIP)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from prism_deco.backbones.base import BACKBONES, VisionBackbone, build_backbone
from prism_deco.backbones.transforms import BackboneTransform
from prism_deco.config import load_choice
from prism_deco.errors import UsageError
from prism_deco.tensors import SUFFIXES


@BACKBONES.register("ensemble")
class Ensemble(VisionBackbone):
    """Towers with equal patch grids; each sees the image through its own transform.

    Args:
        name: the choice's name.
        towers: names of other choices, in the order of their channels.
        weights: folder with `<tower>.safetensors` (or .bin, .pt, .pth, or a folder `<tower>`) for each tower; None
            follows each tower's YAML.
        image_size: side of the input in pixels, for all towers; None follows each tower's YAML.
        grid: patches per side, for all towers: each sees the image at that many times its own patch size.
        layer: see `Tower`; for towers whose YAML names none.
        extra_layers: see `Tower`; for all towers. Channels are ordered by layer, then by tower.
        pretrained, resize, device: see `Tower`; for all towers.

    Raises:
        UsageError: the grids differ, `weights` lacks a tower, or both `grid` and `image_size` are given.
    """

    def __init__(
        self,
        name: str,
        towers: Iterable[str],
        *,
        pretrained: bool = True,
        weights: str | None = None,
        image_size: int | None = None,
        grid: int | None = None,
        layer: int = -2,
        extra_layers: Sequence[int] = (),
        resize: str = "letterbox",
        device: str | torch.device | None = None,
    ):
        super().__init__()
        if grid and image_size:
            raise UsageError(f"backbone.grid={grid} sets the image sizes of the towers: leave out backbone.image_size.")
        members = [
            build_backbone(
                tower,
                pretrained=pretrained,
                device=device,
                image_size=grid * _patch_size(tower) if grid else image_size,
                layer=load_choice("backbone", tower).get("layer", layer),
                extra_layers=extra_layers,
                resize=resize,
                **({"weights": _weights_of(tower, weights)} if weights and pretrained else {}),
            )
            for tower in towers
        ]
        if not members:
            raise UsageError(f"The ensemble {name} has no towers: list at least one under `towers`.")
        self.members = nn.ModuleList(members)
        self.layers = len(extra_layers) + 1
        self.towers = tuple(tower for member in members for tower in member.towers)
        if len(set(self.towers)) < len(self.towers):
            raise UsageError(f"The ensemble {name} lists a tower twice: {', '.join(self.towers)}.")
        if len({member.grid for member in members}) > 1:
            grids = ", ".join(f"{member.towers[0]} {member.grid[0]}x{member.grid[1]}" for member in members)
            raise UsageError(
                f"The towers of the ensemble {name} have different patch grids ({grids}), so their features cannot be "
                f"concatenated: set the patches per side for all of them (grid: {members[0].grid[0]} in the ensemble's "
                "YAML), or an image_size that gives them the same grid."
            )
        first = members[0]
        self.image_size = first.image_size
        self.patch_size = first.patch_size
        self.grid = first.grid
        self.embed_dim = sum(member.embed_dim for member in members)
        self.transform = BackboneTransform(
            {tower: transform for member in members for tower, transform in member.transform.towers.items()}
        )
        self.requires_grad_(False).eval()

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for member in self._backbones() for block in member.blocks]

    def tail(self, layers: int | None) -> list[nn.Module]:
        return [part for member in self._backbones() for part in member.tail(layers)]

    def features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        features = [rearrange(m(pixels), "b n (l d) -> b n l d", l=self.layers) for m in self._backbones()]
        return torch.cat(features, dim=-1).flatten(start_dim=2)

    def _backbones(self) -> list[VisionBackbone]:
        return [member for member in self.members if isinstance(member, VisionBackbone)]


def _patch_size(tower: str) -> int:
    """Side of a tower's patches in pixels."""
    return build_backbone(tower, pretrained=False, device="meta").patch_size


def _weights_of(tower: str, folder: str) -> str:
    for suffix in ("", *SUFFIXES):
        path = Path(folder) / f"{tower}{suffix}"
        if path.exists():
            return str(path)
    raise UsageError(
        f"backbone.weights={folder} has no weights for the tower {tower}: an ensemble takes a folder with "
        f"{tower}.safetensors (or a folder {tower}/), and the same for its other towers."
    )
