"""Captioned images of the miniature world as tensors, and a word-level vocabulary for their captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from prism_deco.miniature.conversations import caption
from prism_deco.miniature.render import render
from prism_deco.miniature.scene import draw_scene

PAD = 0
END = 127
"""The highest id of the text towers' vocabulary: CLIP's text tower pools at the position of the highest id."""


class Vocabulary:
    """Maps the words and single digits of a set of captions to ids between `PAD` and `END`."""

    def __init__(self, texts: Iterable[str]):
        words = sorted({word for text in texts for word in self.split(text)})
        self._ids = {word: index for index, word in enumerate(words, start=PAD + 1)}
        assert len(words) < END - PAD

    @staticmethod
    def split(text: str) -> list[str]:
        """Splits into words and single digits, so that a tower reads numbers digit by digit."""
        return re.findall(r"\d|[a-z]+", text)

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """int64[len(texts), length]: right-padded, with `END` after the last word.

        Raises:
            ValueError: a text does not fit into `length`, or has a word that no caption has.
        """
        ids = torch.full((len(texts), length), PAD)
        for row, text in enumerate(texts):
            words = self.split(text)
            unknown = [word for word in words if word not in self._ids]
            if unknown or len(words) >= length:
                raise ValueError(f"{text!r} has more than {length - 1} words, or unknown ones: {unknown}.")
            ids[row, : len(words) + 1] = torch.tensor([self._ids[word] for word in words] + [END])
        return ids


def phrases(caption: str) -> list[str]:
    """The parts of a caption, one per object: "a small red circle at the top left"."""
    return re.split(r", | and ", caption)


def load_captions(seed: int, count: int) -> tuple[Tensor, list[str]]:
    """Images uint8[count, 3, 64, 64] and their captions, disjoint from the world's own splits."""
    scenes = [draw_scene(seed, "captions", index) for index in range(count)]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return rearrange(images, "n h w c -> n c h w"), [caption(scene) for scene in scenes]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8[B, 3, H, W] -> float[B, 3, H, W], as the tower's transform does (images already have its size)."""
    channels = rearrange(torch.tensor([mean, std]), "k c -> k c 1 1")
    return (images.float() / 255 - channels[0]) / channels[1]
