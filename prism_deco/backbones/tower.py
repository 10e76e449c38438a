"""A backbone with one tower, the base of CLIP, SigLIP and DINOv2."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prism_deco.backbones.base import VisionBackbone
from prism_deco.backbones.transforms import BackboneTransform, TowerTransform
from prism_deco.backbones.trunks import Trunk
from prism_deco.backbones.weights import load_trunk, locate
from prism_deco.errors import UsageError

log = logging.getLogger(__name__)

Channels = tuple[float, float, float]
"""One value each for red, green and blue."""


class Tower(VisionBackbone):
    """One vision transformer; a family (subclass) defines its trunk and the normalisation of pixels: `mean` and `std`
    per colour, for values in 0..1, as class attributes or set by `build_trunk`.

    Args:
        name: the choice's name, the key of its pixels.
        model: architecture, as the family's library names it.
        pretrained: load weights; False draws random ones from torch's global generator.
        weights: file or folder with the weights, `asset:NAME` for a shipped one, None for the hub's.
        hub, file, file_gb: hub repository of the weights, the file in it, its size in GB.
        image_size: side of the input in pixels; None keeps the architecture's own.
        layer: block whose output is used; negative counts from the end.
        extra_layers: more such blocks; the channels of all are concatenated, in the order of the blocks.
        resize: one of `transforms.STRATEGIES`.
        device: where the weights live; None is the CPU.
    """

    mean: Channels
    std: Channels

    def __init__(
        self,
        name: str,
        model: str,
        *,
        pretrained: bool = True,
        weights: str | None = None,
        hub: str | None = None,
        file: str | None = None,
        file_gb: float | None = None,
        image_size: int | None = None,
        layer: int = -2,
        extra_layers: Sequence[int] = (),
        resize: str = "letterbox",
        device: str | torch.device | None = None,
    ):
        super().__init__()
        device = torch.device(device or "cpu")
        path = locate(name, weights, hub, file, file_gb) if pretrained else None
        # If weights are loaded, build on the meta device: random values and unused blocks take no memory.
        with torch.device("meta" if path else device):
            self.trunk = self.build_trunk(model, image_size, (*extra_layers, layer))
        self.towers = (name,)
        self.image_size = self.trunk.image_size
        self.grid = self.trunk.grid
        self.patch_size = self.trunk.patch_size
        self.embed_dim = self.trunk.embed_dim
        self.transform = BackboneTransform({name: TowerTransform(self.image_size, resize, self.mean, self.std)})
        unread = self.image_size - self.grid[0] * self.patch_size
        if unread:
            log.info(
                "%s: %d px is no multiple of its %d px patches, so the grid is %dx%d and the last %d px are not read.",
                *(name, self.image_size, self.patch_size, *self.grid, unread),
            )
        if path:
            load_trunk(self.trunk, path, name, device)
        self.requires_grad_(False).eval()

    def build_trunk(self, model: str, image_size: int | None, layers: Sequence[int]) -> Trunk:
        """The architecture with untrained weights, on the current default device; `image_size` None is its own."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        return self.trunk.blocks

    def features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        images = pixels[self.towers[0]]
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise UsageError(
                f"{self.towers[0]} was built for images [batch, 3, {self.image_size}, {self.image_size}] and got "
                f"{list(images.shape)}: prepare them with the backbone's transform, or build it with that image_size."
            )
        return self.trunk(images.to(next(self.trunk.parameters()).dtype))
