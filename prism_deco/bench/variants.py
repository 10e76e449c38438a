"""Training steps to compare: ours with its optimisations switched on or off, and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from prism_deco.bench.measure import Usage, usage
from prism_deco.llms.encoding import IGNORE
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM

GRAD_CLIP = 1.0


@dataclass(frozen=True)
class Optimisations:
    """What makes our step fast and small; each can be switched."""

    supervised: bool = False
    """Logits at supervised positions only."""
    chunked: bool = False
    """No more than `max_logits` of them at once."""
    packed: bool = False
    """Records one behind the other in a row, each attending to itself, instead of padded."""
    truncated: bool = False
    """Towers end at the block whose output is used."""
    fused: bool = True
    """AdamW in one kernel (the default of transformers' Trainer as well)."""


ALL = Optimisations(supervised=True, chunked=True, packed=True, truncated=True)
NONE = Optimisations()


@dataclass(frozen=True)
class StepVariant:
    """One variant to take the steps of a pool of records.

    Attributes:
        name: for tables.
        batches: one forward pass each, which together hold every record of the pool once.
        loss: a batch and its number of supervised tokens -> float[], their mean loss.
        optimizer: over the same parameters as every other variant's.
    """

    name: str
    batches: Sequence[Batch]
    loss: Callable[[Batch, int], Tensor]
    optimizer: AdamW


def our_loss(vlm: VLM, chosen: Optimisations, max_logits: int) -> Callable[[Batch, int], Tensor]:
    """The loss of a `VLM` with these optimisations; `truncated` and `packed` are up to the VLM and the batch."""

    def loss(batch: Batch, targets: int) -> Tensor:
        if not chosen.supervised:
            logits = vlm.logits(vlm.hidden_states(batch)).float()[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORE)
        vlm.max_logits = max_logits if chosen.chunked else None
        return vlm(batch).total / targets

    return loss


def take_step(
    variant: StepVariant, batch: Batch, parameters: Sequence[nn.Parameter], *, autocast: bool = False
) -> Usage:
    """Takes one optimizer step and measures it.

    The peak is above the static state: weights, gradients and the optimizer's moments. Gradients are
    made within the step, so their size is taken off.
    """
    device = batch.input_ids.device
    targets = batch.num_targets
    with usage(device) as taken:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = variant.loss(batch, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        variant.optimizer.step()
    if taken.peak is not None:
        taken.peak -= sum(p.grad.nbytes for p in parameters if p.grad is not None)
    variant.optimizer.zero_grad(set_to_none=True)
    return taken
