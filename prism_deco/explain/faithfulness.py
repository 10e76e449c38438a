"""Does a map show what the answer rests on? Deletion and insertion curves (RISE, arXiv 1806.07421, section 4.2).

Patches of the image are painted in the tower's mean colour, the most relevant first (deletion), or a
mean-coloured image gets its patches back in that order (insertion). After each step the model is asked
how probable the answer is. The area under the curve is small for deletion, and large for insertion, if
the map is right. Probabilities are averaged over the answer's tokens, so both areas lie in 0..1.

Shapes: K images, N = h*w patches, S pixels per side, T tokens of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional as F

from prism_deco.llms import Encoded
from prism_deco.llms.encoding import IGNORE
from prism_deco.sequence import build_batch
from prism_deco.vlm import VLM


class Curves(NamedTuple):
    """Probability of the answer with 0, 1/steps .. 1 of the patches deleted or inserted: float[steps + 1] each."""

    deletion: Tensor
    insertion: Tensor


def curves(
    vlm: VLM,
    encoded: Encoded,
    targets: int,
    pixels: Mapping[str, Tensor],
    scores: Tensor,
    *,
    steps: int = 10,
    batch_size: int = 16,
) -> Curves:
    """Deletes and inserts patches in the order of their scores.

    Args:
        encoded: question and answer.
        targets: how many of the supervised tokens are the answer's, from the first.
        pixels: per tower float[1, 3, S, S].
        scores: float[N], the map in question; of equal scores the first patch goes first.
        steps: number of equal parts in which the patches go.
        batch_size: images in one forward pass.
    """
    rank = torch.empty(len(scores), dtype=torch.long)
    rank[scores.argsort(descending=True, stable=True).cpu()] = torch.arange(len(scores))
    gone = rank < torch.round(torch.linspace(0, 1, steps + 1) * len(scores))[:, None]
    kept = torch.cat([~gone, gone])
    parts = [_probabilities(vlm, encoded, targets, pixels, part) for part in kept.split(batch_size)]
    deletion, insertion = torch.cat(parts).split(steps + 1)
    return Curves(deletion, insertion)


def area(curve: Tensor) -> float:
    """The area under a curve over 0..1, by trapezoids."""
    return float(torch.trapezoid(curve, dx=1 / (len(curve) - 1)))


@torch.no_grad()
def _probabilities(vlm: VLM, encoded: Encoded, targets: int, pixels: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """float[K]: the answer tokens' mean probability where only the patches kept, bool[K, N], are seen."""
    masked = {
        tower: values * _mask(kept.to(values), values.shape[-1], vlm.backbone.grid) for tower, values in pixels.items()
    }
    device = next(vlm.lm.parameters()).device
    batch = build_batch([encoded] * len(kept), vlm.projector.num_tokens, pixels=masked).to(device)
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:targets, 0]
    answer = batch.labels[:, positions + 1]
    logits = vlm.logits(vlm.hidden_states(batch)[:, positions]).float()
    return logits.softmax(dim=-1).gather(2, answer[..., None])[..., 0].mean(dim=1).cpu()


def _mask(kept: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """float[K, N] per patch -> float[K, 1, S, S] per pixel; pixels beyond the grid go with their neighbours."""
    height, width = grid
    rows, columns = side // height, side // width
    mask = repeat(kept, "k (h w) -> k 1 (h rows) (w columns)", h=height, rows=rows, columns=columns)
    return F.pad(mask, (0, side - width * columns, 0, side - height * rows), mode="replicate")
