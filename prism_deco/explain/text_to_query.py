"""Text-to-Query: how much each answer token depends on each visual token, through the language model.

Shapes: T targets, n positions, M visual tokens, E embedding size.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from prism_deco.explain.attention import Recording, batched_gradients
from prism_deco.explain.propagate import propagate_row, weigh

log = logging.getLogger(__name__)


def propagated_rows(recording: Recording, visual: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """R-GAE: the relevance of the visual tokens to each target, at the position that predicts it.

    Args:
        visual: bool[n], the positions of the visual tokens.
        chunk: targets in one batched backward pass; halved if memory runs out.

    Returns:
        float[T, M], float32 or wider, and the gradients of the targets' logits with respect to the visual tokens
        float[T, M, E].
    """
    targets = len(recording.logits)
    rows, gradients = [], []
    start = 0
    while start < targets:
        try:
            row, gradient = _rows(recording, slice(start, start + chunk))
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            # The same targets again, fewer at a time; the finished rows stay.
            chunk //= 2
            log.warning("Out of memory: continuing with %d tokens at a time", chunk)
            continue
        rows.append(row[:, visual])
        gradients.append(gradient[:, visual])
        start += chunk
    return torch.cat(rows), torch.cat(gradients)


def _rows(recording: Recording, chosen: slice) -> tuple[Tensor, Tensor]:
    """Rows float[T, n] of what all layers add to the relevance, and the gradients of the inputs float[T, n, E].

    The identity that relevance starts from is subtracted, as in the authors' code (transformer-explainability,
    "R - I"): if an answer directly follows the image, its first token is predicted at a visual token, which would count
    as relevant to itself.

    The backward pass and the vector rule both proceed from the top layer down and are interleaved, so that only one
    layer's gradients, float[T, H, n, n], are in memory at a time.
    """
    outputs = recording.logits
    # One-hot vectors [targets, T]: each selects the logit of one chosen target.
    gradients = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)[chosen]
    length = recording.inputs[0].shape[1]
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    start = torch.eye(length, dtype=dtype, device=outputs.device)[recording.positions[chosen]]
    row = start
    for layer_input, attention in zip(recording.inputs[::-1], recording.attentions[::-1], strict=True):
        # From the layer's output to its input, [targets, 1, n, E], and to its map, [targets, 1, H, n, n].
        gradients, by_attention = batched_gradients(outputs, (layer_input, attention), gradients)
        row = propagate_row(row, weigh(attention.detach()[0], by_attention[:, 0]))
        # The next layer's backward pass starts where this one ended.
        outputs = layer_input
    return row - start, gradients[:, 0]


def attention_rows(recording: Recording, visual: Tensor) -> Tensor:
    """float[T, M]: the attention from the predicting positions, averaged over heads and layers."""
    dtype = torch.promote_types(recording.logits.dtype, torch.float32)
    # Per layer float[H, T, M].
    layers = [attention.detach()[0][:, recording.positions][..., visual] for attention in recording.attentions]
    return torch.stack([layer.mean(dim=0, dtype=dtype) for layer in layers]).mean(dim=0)
