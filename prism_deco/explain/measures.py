"""Measures of maps: do they show what the answer depends on, and do visual tokens look at different places?

Deletion and insertion query the model; energy inside the known box and the pointing game (arXiv 1608.00507) compare a
map with the box; redundancy and spread describe the visual tokens' own maps (DeCo, section 3.2 and figure 1).

Shapes: M visual tokens, N = h*w patches, K images, S pixels per side, T tokens of the answer. Boxes are in pixels of
the original image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from prism_deco.explain.geometry import Box, PatchFrame
from prism_deco.llms import Encoded
from prism_deco.llms.encoding import IGNORE
from prism_deco.sequence import build_batch
from prism_deco.vlm import VLM


def energy_in_box(values: Tensor, patches: PatchFrame, box: Box) -> float:
    """The fraction of a map's sum that lies inside a box, 0..1; 0 for a map of zeros.

    A patch counts by the fraction of its area in the box, so a uniform map gets the box's fraction of the grid.

    Args:
        values: float[N], not negative.
    """
    total = float(values.sum())
    return float((values * patches.coverage(box)).sum()) / total if total > 0 else 0.0


def pointing_hit(values: Tensor, patches: PatchFrame, box: Box) -> bool:
    """Whether the patch with the largest value (the first of equal ones) has its centre inside a box.

    A box that contains no patch's centre is hit by the patch that covers the box's centre.

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
    """Mean cosine similarity of the maps of two different visual tokens: 1 if all are alike, 0 if none overlap.

    Args:
        query_to_patch: float[M, N], not negative. Maps of zeros have similarity 0 to all others; a single map has
            redundancy 0.
    """
    rows = F.normalize(query_to_patch, dim=1)
    cosines = rows @ rows.T
    count = len(rows)
    # Over all ordered pairs of different tokens: the diagonal compares each with itself.
    return float((cosines.sum() - cosines.diagonal().sum()) / max(count * (count - 1), 1))


def spread(query_to_patch: Tensor, grid: tuple[int, int]) -> float:
    """How far a visual token's map extends: the root mean square distance of its patches from its centre of mass, in
    fractions of the grid's side, averaged over the tokens. A single patch has 0, a uniform map about 0.41.

    Args:
        query_to_patch: float[M, N], not negative. Maps of zeros are excluded.
    """
    height, width = grid
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    places = rearrange(torch.stack([y, x]), "yx h w -> (h w) yx").to(query_to_patch)
    mass = query_to_patch.sum(dim=1, keepdim=True)
    # Rows of zeros become NaN by the division, and are dropped.
    shares = (query_to_patch / mass)[mass[:, 0] > 0]
    # E[x^2] - E[x]^2 for both axes, [M, 2]; rounding can make it slightly negative.
    variance = shares @ places.square() - (shares @ places).square()
    return float(variance.sum(dim=1).clamp(min=0).sqrt().mean())


def curves(
    vlm: VLM,
    encoded: Encoded,
    targets: int,
    pixels: Mapping[str, Tensor],
    scores: Tensor,
    *,
    steps: int = 10,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Deletion and insertion curves of a map (RISE, arXiv 1806.07421, section 4.2).

    Patches of the image are painted in the tower's mean colour, the most relevant first (deletion), or a mean-coloured
    image gets its patches back in that order (insertion). Each step measures the probability of the answer, averaged
    over its tokens. If the map is right, the area under the curve is small for deletion and large for insertion.

    Args:
        encoded: question and answer.
        targets: the first `targets` supervised tokens are the answer.
        pixels: per tower float[1, 3, S, S].
        scores: float[N], the map; ties are broken by patch index.
        steps: number of equal steps.
        batch_size: images per forward pass.

    Returns:
        Probability 0..1 of the answer with 0, 1/steps .. 1 of the patches deleted, and inserted: float[steps + 1] each.
    """
    # The inverse of the sorting permutation: rank[n] is patch n's place in the order, 0 for the most relevant.
    rank = torch.empty(len(scores), dtype=torch.long)
    rank[scores.argsort(descending=True, stable=True).cpu()] = torch.arange(len(scores))
    # Row k marks the k / steps most relevant patches.
    gone = rank < torch.round(torch.linspace(0, 1, steps + 1) * len(scores))[:, None]
    # Both curves go through the model as one stack of 2 * (steps + 1) images.
    kept = torch.cat([~gone, gone])
    parts = [_probabilities(vlm, encoded, targets, pixels, part) for part in kept.split(batch_size)]
    deletion, insertion = torch.cat(parts).split(steps + 1)
    return deletion, insertion


def area(curve: Tensor) -> float:
    """The area under a curve over 0..1, by the trapezoidal rule."""
    return float(torch.trapezoid(curve, dx=1 / (len(curve) - 1)))


@torch.no_grad()
def _probabilities(vlm: VLM, encoded: Encoded, targets: int, pixels: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """float[K]: the mean probability of the answer's tokens if only the patches `kept`, bool[K, N], are visible."""
    # Pixels are normalised, so that zero is the tower's mean colour.
    masked = {
        tower: values * _mask(kept.to(values), values.shape[-1], vlm.backbone.grid) for tower, values in pixels.items()
    }
    batch = build_batch([encoded] * len(kept), vlm.projector.num_tokens, pixels=masked).to(vlm.device)
    # All rows have the same text, so the first row's positions are those of all; p predicts the label at p + 1.
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:targets, 0]
    answer = batch.labels[:, positions + 1]
    logits = vlm.logits(vlm.hidden_states(batch)[:, positions]).float()
    return logits.softmax(dim=-1).gather(2, answer[..., None])[..., 0].mean(dim=1).cpu()


def _mask(kept: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """float[K, N] per patch -> float[K, 1, S, S] per pixel; pixels beyond the grid repeat their neighbours."""
    height, width = grid
    rows, columns = side // height, side // width
    mask = repeat(kept, "k (h w) -> k 1 (h rows) (w columns)", h=height, rows=rows, columns=columns)
    return F.pad(mask, (0, side - width * columns, 0, side - height * rows), mode="replicate")
