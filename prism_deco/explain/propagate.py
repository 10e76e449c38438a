"""The relevance rules of Generic Attention Explainability (Chefer et al., arXiv 2103.15679, section 3.2).

DeCo's R-GAE (arXiv 2405.20985, section 3.1) applies them to the language model and to the projector.
Relevance starts as the identity, and every attention layer adds to it. The rules multiply matrices; a single row of
their product needs only vector-matrix products, from the top layer down:

    row p of (I + A_L) ... (I + A_1)  =  ((e_p (I + A_L)) (I + A_{L-1})) ...

Shapes: T targets, H heads, n positions, M queries, N patches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import reduce
from torch import Tensor


def weigh(attention: Tensor, gradients: Tensor) -> Tensor:
    """Attention weighted by its gradient: the mean over heads of relu(gradient x attention), eq. 5.

    Args:
        attention: float[H, q, k].
        gradients: float[T, H, q, k].

    Returns:
        float[T, q, k], float32 or wider.
    """
    dtype = torch.promote_types(attention.dtype, torch.float32)
    return reduce((gradients * attention).relu_().to(dtype), "t h q k -> t q k", "mean")


def propagate_row(row: Tensor, weighed: Tensor) -> Tensor:
    """Applies one layer's self-attention rule to one row of the relevance.

    Args:
        row: float[T, n].
        weighed: float[T, n, n], `weigh` of the layer.

    Returns:
        float[T, n].
    """
    # row + row @ weighed for each target, as [T, 1, n] @ [T, n, n].
    return torch.baddbmm(row[:, None], row[:, None], weighed)[:, 0]


def normalise(relevance: Tensor) -> Tensor:
    """Scales the rows of what self-attention added (R - I) to sum to one, and adds the identity (eqs. 8 and 9).

    Rows to which nothing was added remain those of the identity; dividing by their zero sums would erase the update
    of a first cross-attention.

    Args:
        relevance: float[T, M, M].
    """
    identity = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    return normalise_rows(relevance - identity) + identity


def normalise_rows(values: Tensor) -> Tensor:
    """float[..., M, N] with rows scaled to sum to one; rows of zeros are unchanged."""
    total = values.sum(dim=-1, keepdim=True)
    return values / torch.where(total == 0, torch.ones_like(total), total)


def query_to_patch(steps: Iterable[tuple[str, Tensor]], start: Tensor) -> Tensor:
    """Relevance of patches to queries that attend to each other and to the patches.

    The patches do not attend, so their own relevance stays the identity (the paper's encoder-decoder case).

    Args:
        steps: ("self", float[T, M, M]) and ("cross", float[T, M, N]), `weigh` of each layer in order of
            computation.
        start: float[T, M, N], relevance of the patches to the queries before the first layer.

    Returns:
        float[T, M, N].
    """
    patches = start
    queries = torch.eye(start.shape[1], dtype=start.dtype, device=start.device).expand(len(start), -1, -1)
    for kind, weighed in steps:
        if kind == "self":
            # Both updates read the relevance from before the layer.
            queries, patches = queries + weighed @ queries, patches + weighed @ patches
        else:
            # The rule's last factor, the patches' own relevance, is the identity.
            patches = patches + normalise(queries).transpose(1, 2) @ weighed
    return patches
