"""Do the visual tokens look at different places, and each at one? (DeCo, section 3.2 and figure 1.)

Shapes: M visual tokens, N = h*w patches.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


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
    mass, in shares of the grid's side, averaged over the tokens. 0 is a single patch, about 0.41 everywhere.

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
