"""Records for `bench train`: random tokens and pixels with the lengths of LLaVA's 665K mixture.

The composition is published (arXiv 2310.03744, Table 7). Rounds follow from it and from the sizes of the data sets
(VQAv2: 443,757 questions on 82,783 images; GQA: 943,000 on 72,140; region questions come in tens). Words per turn are
estimates that agree within a tenth with the 1,548 bytes per record of the JSON file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism_deco.bench.hf_llava import image_token
from prism_deco.llms.encoding import IGNORE, Encoded, truncate
from prism_deco.sequence import Batch, build_batch, sequence_length
from prism_deco.vlm import VLM

Group = list[tuple[Encoded, dict[str, Tensor] | None]]
"""The records of one forward pass, with the pixels (per tower float[3, S, S]) of those that have an image."""

TOKENS_PER_WORD = 1.3
TOKENS_PER_BOX = 20
"""`[0.12, 0.34, 0.56, 0.78]`, digit by digit."""
TEMPLATE_TOKENS = 8
"""Tokens that a chat format adds to a round; the last one ends the answer and is supervised."""


@dataclass(frozen=True)
class MixturePart:
    """One data set of the mixture.

    Attributes:
        records: number of records.
        rounds: mean number of questions in a conversation; those after the first are Poisson-distributed.
        question, answer: mean words of a question and of an answer, which are log-normal.
        boxes: fraction of rounds whose answer is a box; the same fraction of questions contains one.
        image: whether its records have an image.
        spread: standard deviation of the logarithm of the words.
    """

    records: int
    rounds: float
    question: float
    answer: float
    boxes: float = 0.0
    image: bool = True
    spread: float = 0.4


MIXTURE = {
    "llava_conversation": MixturePart(57_669, 4.5, 11, 33, spread=0.6),
    "llava_detail": MixturePart(23_240, 1, 10, 95),
    "llava_reasoning": MixturePart(76_803, 1, 16, 110),
    "sharegpt": MixturePart(40_688, 5, 55, 155, image=False, spread=1.0),
    "vqav2": MixturePart(82_783, 5.4, 7, 1.1),
    "gqa": MixturePart(72_140, 13, 9, 1),
    "okvqa": MixturePart(8_998, 1, 18, 1.2),
    "ocrvqa": MixturePart(80_000, 4.8, 8, 4),
    "aokvqa": MixturePart(66_160, 1, 28, 1),
    "textcaps": MixturePart(21_953, 1, 25, 12),
    "refcoco": MixturePart(48_447, 8, 10, 4, boxes=0.5),
    "vg": MixturePart(86_417, 10, 10, 4, boxes=0.5),
}
"""665,298 records, 624,610 of them with an image."""


Rounds = list[tuple[int, int]]
"""Tokens of the question and of the answer of each round of a conversation."""


def draw_rounds(count: int, seed: int = 0) -> list[tuple[str, Rounds]]:
    """Lengths of records drawn from the mixture, each with the name of its part."""
    rng = np.random.default_rng(seed)
    weights = np.array([part.records for part in MIXTURE.values()], dtype=float)
    names = rng.choice(list(MIXTURE), size=count, p=weights / weights.sum())
    return [(str(name), _rounds(MIXTURE[str(name)], rng)) for name in names]


def _rounds(part: MixturePart, rng: np.random.Generator) -> Rounds:
    def words(mean: float) -> int:
        # exp(mu + sigma^2 / 2) is the mean of a log-normal distribution.
        drawn = rng.lognormal(np.log(mean) - part.spread**2 / 2, part.spread)
        return max(1, round(float(drawn)))

    rounds = []
    for _ in range(1 + rng.poisson(part.rounds - 1)):
        # One draw decides whether the answer is a box, the question contains one, or neither.
        box = part.boxes and rng.random()
        asks_for_box = 0 < box < part.boxes
        shows_box = part.boxes <= box < 2 * part.boxes
        answer = TOKENS_PER_BOX if asks_for_box else round(words(part.answer) * TOKENS_PER_WORD)
        question = round(words(part.question) * TOKENS_PER_WORD) + shows_box * TOKENS_PER_BOX
        rounds.append((question, answer))
    return rounds


def encode(rounds: Rounds, image: bool, vocabulary: int, rng: np.random.Generator, *, max_text_tokens: int) -> Encoded:
    """A conversation of random tokens below `vocabulary`, with its image after the first token."""

    def tokens(count: int) -> list[int]:
        return [int(rng.integers(vocabulary)) for _ in range(count)]

    ids, labels, numbers = tokens(1), [IGNORE], [0]
    for number, (question, answer) in enumerate(rounds, start=1):
        # All but one of the template's tokens precede the answer; the last one ends it and is supervised.
        asked = question + TEMPLATE_TOKENS - 1
        said = tokens(answer + 1)
        ids += tokens(asked) + said
        labels += [IGNORE] * asked + said
        numbers += [number] * (asked + len(said))
    return truncate(Encoded(ids, labels, numbers, [1] if image else []), max_text_tokens)[0]


def draw_pool(vlm: VLM, *, batch_size: int, steps: int, max_text_tokens: int, seed: int) -> list[Group]:
    """Global batches of records with the lengths of the mixture, in random order."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    records: Group = []
    side = vlm.backbone.image_size
    for name, rounds in draw_rounds(batch_size * steps, seed):
        image = MIXTURE[name].image
        encoded = encode(rounds, image, image_token(vlm), rng, max_text_tokens=max_text_tokens)
        pixels = {tower: torch.randn(3, side, side, generator=generator) for tower in vlm.backbone.towers}
        records.append((encoded, pixels if image else None))
    return [records[i : i + batch_size] for i in range(0, len(records), batch_size)]


def build_batches(vlm: VLM, groups: Sequence[Group], device: torch.device, *, pack: bool) -> list[Batch]:
    """One batch per group, padded or packed, on the device."""
    batches = []
    for members in groups:
        images = [pixels for _, pixels in members if pixels is not None]
        stacked = None  # a group without images
        if images:
            stacked = {tower: torch.stack([pixels[tower] for pixels in images]) for tower in vlm.backbone.towers}
        encoded = [e for e, _ in members]
        names = [str(i) for i in range(len(members))]
        batch = build_batch(encoded, vlm.projector.num_tokens, pixels=stacked, pack=pack, ids=names)
        batches.append(batch.to(device))
    return batches


def by_length(groups: Sequence[Group], tokens_per_image: int) -> list[Group]:
    """Regroups the records by length, images included, which minimises padding."""
    size = len(groups[0])
    records = [record for group in groups for record in group]
    ordered = sorted(records, key=lambda record: -sequence_length(record[0], tokens_per_image))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
