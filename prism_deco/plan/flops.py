"""Floating-point operations of training, in closed form: cheap enough to be computed at every step.

Counted are matrix products and convolutions, two operations per multiplication and addition, without what activation
checkpointing computes again and without padding. Attention counts all pairs of positions, masked ones too, as is usual
for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch import nn

from prism_deco.llms.layers import decoder_layers
from prism_deco.plan.meta_models import backbone_key, llm_of, projector_key, projector_of
from prism_deco.plan.phases import walk_projector, walk_tower
from prism_deco.plan.setup import Setup


@dataclass(frozen=True)
class TrainingFlops:
    """What one of each costs, forward and backward pass together; the tower is frozen and has no backward pass."""

    tower: int
    """Of an image."""
    projector: int
    """Of an image."""
    position: int
    """Of a position of the LLM, attention and output head apart."""
    pair: int
    """Of attention between two positions."""
    target: int
    """Of the output head at a supervised position."""

    def vision(self, images: float) -> float:
        """Of images, up to the visual tokens."""
        return images * (self.tower + self.projector)

    def step(self, *, images: float, positions: float, pairs: float, targets: float) -> float:
        """Of an optimizer step over all devices, or of any other lot.

        Args:
            images: images shown.
            positions: positions of all sequences, visual tokens included.
            pairs: sum of the squared lengths of the sequences.
            targets: supervised positions.
        """
        language = positions * self.position + pairs * self.pair + targets * self.target
        return self.vision(images) + language


def training_flops(config: DictConfig, images: int = 1, setup: Setup | None = None) -> TrainingFlops:
    """The costs of a configured model, from its bare architecture.

    Args:
        images: how many to walk through tower and projector with; the costs of one do not depend on it.
        setup: types to compute in; nor on these.
    """
    lm = llm_of(config).model
    projector_of(config)  # raises where it does not fit
    setup = (setup or Setup()).outside_llm
    tower = walk_tower(backbone_key(config), images, setup)
    projector = walk_projector(projector_key(config), tower.shape, tower.dtype, setup)
    settings: Any = lm.config
    layers = decoder_layers(lm)
    width = settings.num_attention_heads * (
        getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    )
    head: Any = lm.get_output_embeddings()  # type: ignore[operator]  # every causal LM has them
    return TrainingFlops(
        tower=tower.flops,
        projector=projector.flops,
        position=sum(_product(weight) for layer in layers for weight in layer.parameters() if weight.ndim == 2),
        # Scores and weighted sum, forward; and the gradients of both factors of each.
        pair=3 * 2 * 2 * width * len(layers),
        target=_product(head.weight),
    )


def _product(weight: nn.Parameter) -> int:
    """Of a vector times a matrix: the product, its gradient and, where the matrix is trained, the matrix' gradient."""
    return 2 * weight.numel() * (3 if weight.requires_grad else 2)
