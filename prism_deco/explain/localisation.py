"""Does a map point at the right thing? Energy inside its box, and the pointing game (arXiv 1608.00507).

Both read the map on the patch grid. A box is given in pixels of the original image.
"""

from __future__ import annotations

from torch import Tensor

from prism_deco.explain.geometry import Box, PatchFrame


def energy_in_box(values: Tensor, patches: PatchFrame, box: Box) -> float:
    """The share of a map's sum that lies inside a box, 0..1; 0 for a map of zeros.

    A patch counts by the share of its area in the box. A uniform map gets the box's share of the grid.

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
