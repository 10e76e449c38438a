"""CLIP's and SigLIP's objectives: complete open_clip models, with text tower and loss, trained on captions.

They differ from the originals in two ways, both to make patches informative. Texts are the phrases of the captions, one
per object, so an image has several positives. Similarity is a soft maximum over an image's patches (FILIP, arXiv
2111.07783, takes the hard one), so some patch has to encode each phrase.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import open_clip
import torch
from captioned_images import Vocabulary, phrases
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F

import prism_deco.miniature.architectures  # noqa: F401  (registers the miniature's architectures)

_LENGTH = 14
"""Tokens of a phrase: at most ten words and digits, `END`, and padding."""
_MAX_PHRASES = 128
"""Phrases per batch, to limit the time spent in the text tower."""


def soft_maximum(patches: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """float[B, N, D], float[T, D], float[] -> float[B, T]: log-sum-exp of scaled similarities over patches."""
    return torch.logsumexp(scale * patches @ texts.T, dim=1)


class PhraseClipLoss(ClipLoss):
    """CLIP's softmax loss (arXiv 2103.00020) over images and over phrases.

    Several positives share the target evenly (UniCL, arXiv 2204.03610).
    """

    positives: Tensor

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor:
        """float[B, N, D], float[T, D], L2-normalised -> float[]; `positives` is bool[B, T]."""
        logits = soft_maximum(image_features, text_features, logit_scale)
        targets = self.positives.to(logits.dtype)
        # An image without a sampled phrase has an all-zero target and contributes nothing to the loss.
        by_image = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True).clamp(min=1))
        by_phrase = F.cross_entropy(logits.T, (targets / targets.sum(0)).T)
        return (by_image + by_phrase) / 2


class PhraseSigLipLoss(SigLipLoss):
    """SigLIP's sigmoid loss (arXiv 2303.15343) over all pairs of images and phrases."""

    positives: Tensor

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """float[B, T]: 1 if the caption contains the phrase, else -1."""
        return self.positives.to(dtype) * 2 - 1

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """float[B, N, D], float[T, D], L2-normalised -> float[B, T]."""
        logits = soft_maximum(image_features, text_features, logit_scale)
        return logits if logit_bias is None else logits + logit_bias


class ContrastivePretraining(nn.Module):
    """An open_clip model with a loss over images and phrases; only its vision tower, `vit`, is kept.

    Args:
        model: open_clip's name of the architecture.
        captions: all captions of the run, from which the vocabulary is built.
        seed: seeds the sampling of phrases.
        loss: the loss of the model's family.
    """

    def __init__(self, model: str, captions: Sequence[str], seed: int, loss: PhraseClipLoss | PhraseSigLipLoss):
        super().__init__()
        self.model = cast(Any, open_clip.create_model(model, load_weights=False))
        self.vit = self.model.visual.trunk
        self.vocabulary = Vocabulary(captions)
        self.dice = random.Random(seed)
        self.loss = loss

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """float[B, 3, S, S], B captions -> loss, float[]."""
        parts = [set(phrases(caption)) for caption in captions]
        known = sorted(set().union(*parts))
        chosen = self.dice.sample(known, min(len(known), _MAX_PHRASES))
        self.loss.positives = torch.tensor([[phrase in part for phrase in chosen] for part in parts])
        return self.loss(self.patches(images), self.texts(chosen), self.model.logit_scale.exp(), self.model.logit_bias)

    def patches(self, images: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, N, D], L2-normalised, in the embedding space of the phrases."""
        return F.normalize(self.vit.forward_features(images), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """T phrases -> float[T, D], L2-normalised."""
        return self.model.encode_text(self.vocabulary.encode(texts, _LENGTH), normalize=True)

    def evaluate(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Top-1 retrieval among the given images and their captions."""
        parts = [phrases(caption) for caption in captions]
        known = sorted({phrase for part in parts for phrase in part})
        has = torch.tensor([[phrase in part for phrase in known] for part in parts])
        logits = soft_maximum(self.patches(images), self.texts(known), self.model.logit_scale.exp())
        if self.model.logit_bias is not None:
            logits = logits + self.model.logit_bias
        return retrieval(self.score(logits, has), captions)

    def score(self, logits: Tensor, has: Tensor) -> Tensor:
        """float[B, T], bool[captions, T] -> float[B, captions]: how well each caption fits each image."""
        raise NotImplementedError


class ClipPretraining(ContrastivePretraining):
    """`PhraseClipLoss`."""

    def __init__(self, model: str, captions: Sequence[str], seed: int):
        super().__init__(model, captions, seed, PhraseClipLoss())

    def score(self, logits: Tensor, has: Tensor) -> Tensor:
        """The mean over the caption's phrases, as FILIP takes the mean over a text's tokens."""
        return logits @ (has / has.sum(1, keepdim=True)).T


class SiglipPretraining(ContrastivePretraining):
    """`PhraseSigLipLoss`."""

    def __init__(self, model: str, captions: Sequence[str], seed: int):
        super().__init__(model, captions, seed, PhraseSigLipLoss())

    def score(self, logits: Tensor, has: Tensor) -> Tensor:
        """The log-likelihood that exactly the caption's phrases are true, each phrase an independent binary choice."""
        return F.logsigmoid(logits) @ has.float().T + F.logsigmoid(-logits) @ (~has).float().T


def retrieval(scores: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Top-1 accuracies of scores float[B, B] of images and captions; equal captions count as a match."""
    names = list(captions)
    to_text = [names[found] == names[own] for own, found in enumerate(scores.argmax(1).tolist())]
    to_image = [names[found] == names[own] for own, found in enumerate(scores.argmax(0).tolist())]
    return {
        "image_to_text": sum(to_text) / len(names),
        "text_to_image": sum(to_image) / len(names),
        "candidates": len(names),
    }
