"""Floating-point operations of training in closed form, cheap enough to compute at every step.

Counts matrix products and convolutions, two operations per multiply-add, without padding and without recomputation by
activation checkpointing. Attention counts all pairs of positions, masked ones too, as usual for model FLOPs utilisation
(PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from prism_deco.backbones import VisionBackbone
from prism_deco.llms.layers import decoder_layers
from prism_deco.plan.meta_models import backbone_of, llm_of, projector_of, short_backbone, without_data
from prism_deco.projectors import Projector

_META = torch.device("meta")


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of forward and backward pass per unit; a frozen tower has no backward pass."""

    tower: int
    """Per image."""
    projector: int
    """Per image."""
    position: int
    """Per position of the LLM, without attention and output head."""
    pair: int
    """Per pair of positions in attention."""
    target: int
    """Of the output head, per supervised position."""

    def step(self, *, images: float, positions: float, pairs: float, targets: float) -> float:
        """Operations for a set of records, for example those of an optimizer step on all devices.

        Args:
            images: images shown.
            positions: positions of all sequences, visual tokens included.
            pairs: sum of the squared lengths of the sequences.
            targets: supervised positions.
        """
        language = positions * self.position + pairs * self.pair + targets * self.target
        return images * (self.tower + self.projector) + language


def training_flops(config: DictConfig) -> TrainingFlops:
    """Operations of the configured model, counted on the meta device.

    Raises:
        NeedsData: a part cannot run without data.
    """
    lm = llm_of(config).model
    settings: Any = lm.config
    layers = decoder_layers(lm)
    weights = [weight for layer in layers for weight in layer.parameters()]
    head: Any = lm.get_output_embeddings()  # type: ignore[operator]  # every causal LM has them
    return TrainingFlops(
        tower=_tower_flops(backbone_of(config)),
        projector=_projector_flops(projector_of(config)),
        # The matrices of linear layers; norms and biases are vectors.
        position=sum(_product(weight) for weight in weights if weight.ndim == 2),
        # Scores and weighted sum, each with a forward product and two products for the gradients of its factors.
        pair=3 * 2 * 2 * sum(_attention_width(layer) for layer in settings.per_layer_config),
        target=_product(head.weight),
    )


def step_flops(module: nn.Module, features: Tensor | dict[str, Tensor]) -> tuple[int, int]:
    """Operations of a module's forward pass, and of both passes together."""
    with FlopCounterMode(display=False, custom_mapping={_CONVOLUTION: _convolution_backward_flops}) as counter:
        total = module(features).sum()
        forward = counter.get_total_flops()
        total.backward()
    return forward, counter.get_total_flops()


_CONVOLUTION = torch.ops.aten.convolution_backward


def _convolution_backward_flops(
    grad: Sequence[int], features: Sequence[int], weight: Sequence[int], *args: Any, **_: Any
) -> int:
    """Each gradient of a convolution takes as many operations as the convolution itself.

    torch's formula ignores groups in the weight's gradient, so a depthwise convolution would cost as much as a dense
    one.
    """
    # The gradient has the shape of the convolution's output, which the count is based on.
    wanted: Sequence[bool] = args[-1]  # gradients of input, weight, bias; the last is not counted
    return (wanted[0] + wanted[1]) * conv_flop_count(list(features), list(weight), list(grad))


# On the meta device attention runs as matrix products. Fused kernels of other devices would count as zero, since torch
# has no formula for them.
@lru_cache(maxsize=32)
def _tower_flops(tower: VisionBackbone) -> int:
    if tower.trained:
        # The whole tower: the backward pass only reaches down to the first trained block.
        with without_data("backbone"):
            return step_flops(copy.deepcopy(tower), tower.blank(_META))[1]
    backbone, runs = short_backbone(tower)
    with without_data("backbone"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(backbone.blank(_META))
    # Keys are module paths that begin with the root's class name. One block of each run of equal blocks has been
    # counted; the others of the run cost the same.
    per_module = counter.get_flop_counts()
    total = counter.get_total_flops()
    names = {module: name for name, module in backbone.named_modules()}
    for block, times in runs:
        total += (times - 1) * sum(per_module[f"{type(backbone).__name__}.{names[block]}"].values())
    return total


@lru_cache(maxsize=64)
def _projector_flops(bare: Projector) -> int:
    # A copy, since the shared module must keep its mode and must not collect gradients.
    projector = copy.deepcopy(bare).train()
    height, width = projector.in_grid
    with without_data("projector"):
        return step_flops(projector, torch.empty(1, height * width, projector.in_dim, device=_META))[1]


def _attention_width(settings: Any) -> int:
    """Total width of the heads of one layer; 0 for an architecture without attention."""
    heads = getattr(settings, "num_attention_heads", None) or 0
    return heads * (getattr(settings, "head_dim", None) or settings.hidden_size // max(heads, 1))


def _product(weight: nn.Parameter) -> int:
    """Operations per input row: the product, the input's gradient and, if it is trained, the weight's gradient."""
    return 2 * weight.numel() * (3 if weight.requires_grad else 2)
