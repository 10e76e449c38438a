"""Transforms an image to the square input of a tower: geometry, resampling, normalisation.

The geometry is computed once, as a `Frame`, which maps both pixels and coordinates (boxes, heat maps), so they always
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prism_deco.config.registry import unknown
from prism_deco.config.schema import RESIZE


@dataclass(frozen=True)
class Frame:
    """The mapping from the pixels of an image to the S x S pixels that a tower sees.

    Sizes are (width, height) and positions (x, y), in pixels. The image is pasted onto a canvas at `paste`, the canvas
    is resized, and S x S pixels are cropped from it at `crop`.
    """

    image_size: tuple[int, int]
    canvas: tuple[int, int]
    paste: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    side: int

    def to_model(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Pixel coordinates of the image (numbers or arrays) -> those of the tower's input."""
        return (
            (x + self.paste[0]) * (self.resized[0] / self.canvas[0]) - self.crop[0],
            (y + self.paste[1]) * (self.resized[1] / self.canvas[1]) - self.crop[1],
        )

    def to_image(self, x: Any, y: Any) -> tuple[Any, Any]:
        """The inverse of `to_model`; results outside the image lie in the padding."""
        return (
            (x + self.crop[0]) * (self.canvas[0] / self.resized[0]) - self.paste[0],
            (y + self.crop[1]) * (self.canvas[1] / self.resized[1]) - self.paste[1],
        )

    def apply(self, image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
        """The S x S image that the tower sees, with padding of colour `fill`."""
        if self.canvas != self.image_size:
            canvas = Image.new("RGB", self.canvas, fill)
            canvas.paste(image, self.paste)
            image = canvas
        if self.resized != image.size:
            image = image.resize(self.resized, Image.Resampling.BICUBIC)
        left, top = self.crop
        return image.crop((left, top, left + self.side, top + self.side))


def _shorter_side_to(side: int, canvas: tuple[int, int]) -> tuple[int, int]:
    short = min(canvas)
    return int(side * canvas[0] / short), int(side * canvas[1] / short)


def letterbox(size: tuple[int, int], side: int) -> Frame:
    """Prismatic's letterbox: pads the shorter side at both ends by int(difference / 2).

    An odd difference therefore leaves the canvas 1 px short of a square.
    """
    longest = max(size)
    paste = ((longest - size[0]) // 2, (longest - size[1]) // 2)
    canvas = (size[0] + 2 * paste[0], size[1] + 2 * paste[1])
    resized = _shorter_side_to(side, canvas)
    crop = (round((resized[0] - side) / 2), round((resized[1] - side) / 2))  # as torchvision's CenterCrop
    return Frame(size, canvas, paste, resized, crop, side)


def pad(size: tuple[int, int], side: int) -> Frame:
    """LLaVA-1.5's padding (`expand2square`) to an exact square."""
    longest = max(size)
    paste = ((longest - size[0]) // 2, (longest - size[1]) // 2)
    return Frame(size, (longest, longest), paste, (side, side), (0, 0), side)


def resize_naive(size: tuple[int, int], side: int) -> Frame:
    """Scales width and height independently (prismatic)."""
    return Frame(size, size, (0, 0), (side, side), (0, 0), side)


def resize_crop(size: tuple[int, int], side: int) -> Frame:
    """Scales the shorter side and crops the longer one (transformers' CLIP processor)."""
    resized = _shorter_side_to(side, size)
    crop = ((resized[0] - side) // 2, (resized[1] - side) // 2)
    return Frame(size, size, (0, 0), resized, crop, side)


STRATEGIES: dict[str, Callable[[tuple[int, int], int], Frame]] = dict(
    zip(RESIZE, (letterbox, pad, resize_naive, resize_crop), strict=True)
)
"""The choices of `resize`: (width, height) of an image and the side of the input in pixels -> `Frame`."""


@dataclass(frozen=True)
class TowerTransform:
    """Image -> input of one tower.

    Args:
        image_size: side S of the input in pixels. Images are resized to this size, without the crop margin of timm's
            evaluation transforms (crop_pct 0.9 for SigLIP).
        resize: one of `STRATEGIES`.
        mean, std: normalisation per RGB channel, for values in 0..1.
    """

    image_size: int
    resize: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.resize not in STRATEGIES:
            raise unknown("resize", self.resize, STRATEGIES)

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB colour of the padding: the mean colour, rounded down as the references do."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return red, green, blue

    def frame(self, size: tuple[int, int]) -> Frame:
        """The geometry for an image of `size` (width, height)."""
        return STRATEGIES[self.resize](size, self.image_size)

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode -> float32[3, S, S]."""
        rgb = image.convert("RGB")
        square = self.frame(rgb.size).apply(rgb, self.fill)
        values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return (values - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class BackboneTransform:
    """Image -> inputs of all towers of a backbone. Small and picklable, for loader processes."""

    towers: dict[str, TowerTransform]

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """PIL image -> float32[3, S, S] per tower name."""
        return {name: transform(image) for name, transform in self.towers.items()}

    def frame(self, size: tuple[int, int]) -> Frame:
        """The geometry of the first tower; those of the others differ at most in scale."""
        return next(iter(self.towers.values())).frame(size)
