"""Numbers about maps: do they point at the right thing, do visual tokens look at different places?

Energy inside the known box and the pointing game (arXiv 1608.00507) read a map on the patch grid; redundancy and
spread describe the visual tokens' own maps (DeCo, section 3.2 and figure 1).

Shapes: M visual tokens, N = h*w patches. Boxes are in pixels of the original image.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from prism_deco.explain.geometry import Box, PatchFrame


def energy_in_box(values: Tensor, patches: PatchFrame, box: Box) -> float:
    """The fraction of a map's sum that lies inside a box, 0..1; 0 for a map of zeros.

    A patch counts by the fraction of its area in the box. A uniform map gets the box's fraction of the grid.

    Args:
        values: float[N], not negative.
    """
    total = float(values.sum())
    return float((values * patches.coverage(box)).sum()) / total if total > 0 else 0.0


def pointing_hit(values: Tensor, patches: PatchFrame, box: Box) -> bool:
    """Whether the patch with the largest value has its centre inside a box; the first of equal ones counts.

    A box that holds no patch's centre is hit by the patch that covers its own centre.

    Args:
        values: float[N].
    """
    x1, y1, x2, y2 = patches.to_grid(box)
    row, column = divmod(int(values.argmax()), patches.grid[1])
    inside = x1 <= column + 0.5 <= x2 and y1 <= row + 0.5 <= y2
    return inside or (row, column) == (int((y1 + y2) / 2), int((x1 + x2) / 2))


def padding_fraction(values: Tensor, patches: PatchFrame) -> float:
    """The fraction of a map's sum that lies outside the image, in the padding of a letterbox; 0 for a map of zeros.

    Args:
        values: float[N], not negative.
    """
    width, height = patches.frame.image_size
    total = float(values.sum())
    return 1 - energy_in_box(values, patches, (0, 0, width, height)) if total > 0 else 0.0


def redundancy(query_to_patch: Tensor) -> float:
    """Mean cosine between the maps of two different visual tokens: 1 if all look at the same, 0 if none overlap.

    Args:
        query_to_patch: float[M, N], not negative. Maps of zeros have cosine 0 with all others; a single map
            is not redundant.
    """
    rows = F.normalize(query_to_patch, dim=1)
    cosines = rows @ rows.T
    count = len(rows)
    return float((cosines.sum() - cosines.diagonal().sum()) / max(count * (count - 1), 1))


def spread(query_to_patch: Tensor, grid: tuple[int, int]) -> float:
    """How far a visual token's map reaches: the root mean square distance of its patches from its centre of
    mass, in fractions of the grid's side, averaged over the tokens. 0 is a single patch, about 0.41 everywhere.

    Args:
        query_to_patch: float[M, N], not negative. Maps of zeros are left out.
    """
    height, width = grid
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    places = rearrange(torch.stack([y, x]), "yx h w -> (h w) yx").to(query_to_patch)
    mass = query_to_patch.sum(dim=1, keepdim=True)
    shares = (query_to_patch / mass)[mass[:, 0] > 0]
    variance = shares @ places.square() - (shares @ places).square()
    return float(variance.sum(dim=1).clamp(min=0).sqrt().mean())
