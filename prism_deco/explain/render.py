"""Pictures: maps laid over the original image, and the mosaic of all visual tokens' maps."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prism_deco.explain.geometry import PatchFrame


def _colors(values: np.ndarray) -> np.ndarray:
    """uint8[..., 3] of values 0..1; brightness increases with the value, so it also reads in greyscale."""
    from matplotlib import colormaps  # takes a while to import

    return np.asarray(colormaps["inferno"](values, bytes=True))[..., :3]


def scaled(values: Tensor) -> Tensor:
    """Min-max scaling to 0..1; zeros if all values are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def color_anchors() -> list[list[int]]:
    """Nine equally spaced colours of the colour map, 0..255, for the page to interpolate between."""
    return _colors(np.linspace(0, 1, 9)).tolist()


def overlay(image: Image.Image, values: Tensor, patches: PatchFrame, *, max_side: int = 768) -> Image.Image:
    """A map over the original image, in the image's aspect ratio.

    The image is greyscale, so that its colours are not mistaken for the map's, and dimmed where the map is low.

    Args:
        values: float[N].
        max_side: the longer side of the result in pixels; small images are enlarged to it.
    """
    width, height = image.size
    scale = max_side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    heat = patches.upsample(scaled(values), size)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    # Opacity of the map per pixel, [height, width, 1], from 0.25 to 0.85.
    weight = (0.25 + 0.6 * heat.double().numpy())[..., None]
    mixed = (1 - weight) * grey[..., None] * 0.85 + weight * _colors(heat.numpy())
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def mosaic(
    image: Image.Image,
    query_to_patch: Tensor,
    query_grid: tuple[int, int],
    patches: PatchFrame,
    *,
    side: int = 112,
) -> Image.Image:
    """One small overlay per visual token, arranged as their grid (DeCo, figures 1, 3 and 10).

    At most 8 x 8: of a larger grid, evenly spaced visual tokens are shown.

    Args:
        query_to_patch: float[M, N].
        side: the longer side of one overlay in pixels.
    """
    rows, columns = (_spaced(size, most=8) for size in query_grid)
    gap = 4
    # The visual token at row i and column j of the grid has the number i * columns of the grid + j.
    tiles = [
        [overlay(image, query_to_patch[i * query_grid[1] + j], patches, max_side=side) for j in columns] for i in rows
    ]
    width, height = tiles[0][0].size
    sheet = Image.new("RGB", (len(columns) * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            sheet.paste(tile, (j * (width + gap), i * (height + gap)))
    return sheet


def _spaced(size: int, most: int) -> list[int]:
    count = min(size, most)
    # The middles of `count` equal parts of 0 .. size.
    return [int((k + 0.5) * size / count) for k in range(count)]
