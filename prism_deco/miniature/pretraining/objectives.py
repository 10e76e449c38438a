"""What each family of miniature towers is pretrained on: the contract.

CLIP and SigLIP (`contrastive.py`) learn from captions, DINOv2's stand-in (`masked.py`) from images
only. No objective uses the renderer's labels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import prism_deco.miniature.architectures  # noqa: F401  (registers the miniature architectures)
from prism_deco.config.registry import Registry


class Objective(nn.Module):
    """A model that ends in a loss; `vit` is the tower that is kept.

    Args:
        model: architecture as the backbone's YAML names it.
        captions: all captions of the run, from which the vocabulary is built.
        seed: seeds the choice of words and masks.
    """

    vit: VisionTransformer

    @abstractmethod
    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """float[B, 3, S, S], B captions -> loss, float[]."""

    @abstractmethod
    def evaluate(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Figures on held-out images, by name."""


OBJECTIVES: Registry[type[Objective]] = Registry("pretraining objective", package="prism_deco.miniature.pretraining")
