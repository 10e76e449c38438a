"""Maps between the patch grid and the original image: undoes crops and padding, converts boxes.

Boxes are (x1, y1, x2, y2). N = h*w patches in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from prism_deco.backbones.transforms import Frame

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PatchFrame:
    """The patch grid of one image.

    Attributes:
        frame: maps pixels of the image to those of the tower's input.
        grid: (height, width) of the patches; it starts in the input's upper left corner.
        patch_size: side of a patch in pixels of the input.
    """

    frame: Frame
    grid: tuple[int, int]
    patch_size: int

    @property
    def rect(self) -> Box:
        """The grid's outline in fractions of the image's width and height; padding lies outside 0..1."""
        (height, width), (image_width, image_height) = self.grid, self.frame.image_size
        x1, y1 = self.frame.to_image(0.0, 0.0)
        x2, y2 = self.frame.to_image(float(width * self.patch_size), float(height * self.patch_size))
        return x1 / image_width, y1 / image_height, x2 / image_width, y2 / image_height

    def to_grid(self, box: Box) -> Box:
        """A box in pixels of the image, in patches."""
        x1, y1 = self.frame.to_model(box[0], box[1])
        x2, y2 = self.frame.to_model(box[2], box[3])
        return x1 / self.patch_size, y1 / self.patch_size, x2 / self.patch_size, y2 / self.patch_size

    def coverage(self, box: Box) -> Tensor:
        """float[N]: the fraction of each patch's area inside a box given in pixels of the image."""
        x1, y1, x2, y2 = self.to_grid(box)
        # The fraction of an area is the product of those of its sides.
        rows, columns = _overlap(y1, y2, self.grid[0]), _overlap(x1, x2, self.grid[1])
        return rearrange(rows[:, None] * columns, "h w -> (h w)")

    def upsample(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsamples a map over the patches to the pixels of the image, or of a scaled copy.

        Bilinear between the patches' centres. What the tower did not see (cropped away) gets zero.

        Args:
            values: float[N].
            size: (width, height) of the result.

        Returns:
            float[height, width].
        """
        image_width, image_height = self.frame.image_size
        width, height = size
        # Centres of the result's pixels: in pixels of the image, then in those of the tower's input.
        x, y = self.frame.to_model(
            (torch.arange(width) + 0.5) * (image_width / width), (torch.arange(height) + 0.5) * (image_height / height)
        )
        # grid_sample counts from -1 to 1 between the outer corners of the grid.
        x = 2 * x / (self.patch_size * self.grid[1]) - 1
        y = 2 * y / (self.patch_size * self.grid[0]) - 1
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [height, width, 2], (x, y) last
        grid = rearrange(values.to(torch.float32), "(h w) -> 1 1 h w", h=self.grid[0])
        # Between the outer patches' centres and the grid's edge, their values are repeated.
        sampled = F.grid_sample(grid, places[None], padding_mode="border", align_corners=False)[0, 0]
        # The tolerance absorbs rounding at the grid's edge.
        seen = (places.abs() <= 1 + 1e-6).all(dim=-1)
        return torch.where(seen, sampled, torch.zeros_like(sampled))


def _overlap(start: float, end: float, cells: int) -> Tensor:
    """float[cells]: the fraction of each unit cell between start and end."""
    edge = torch.arange(cells, dtype=torch.float64)
    return ((edge + 1).clamp(max=end) - edge.clamp(min=start)).clamp(min=0).float()
