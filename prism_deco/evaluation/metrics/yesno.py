"""Yes/no questions: reading the answer, and the counts made of it (POPE, MME)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def parse_pope(output: str) -> str:
    """LLaVA's reading: "no" where the first sentence has the word No, no or not, else "yes".

    Words are what single spaces separate, so that "no\\n" is none; whatever is not a no counts as a yes.
    """
    words = output.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def says_yes_or_no(output: str) -> bool:
    """Whether the output has a yes, no or not at all; `parse_pope` calls all else a yes in silence."""
    return re.search(r"\b(yes|no|not)\b", output, re.IGNORECASE) is not None


def parse_mme(output: str) -> str | None:
    """MME's reading: yes or no where that is all, else what the first four characters contain; None is neither."""
    text = output.lower()
    if text in ("yes", "no"):
        return text
    return next((answer for answer in ("yes", "no") if answer in text[:4]), None)


@dataclass(frozen=True)
class YesNo:
    """Counts with "yes" as the positive class; undefined ratios are 0 (the scripts would divide by zero)."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int

    @property
    def accuracy(self) -> float:
        return _ratio(self.true_positive + self.true_negative, self.total)

    @property
    def precision(self) -> float:
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.true_positive + self.false_positive, self.total)

    @property
    def total(self) -> int:
        return self.true_positive + self.false_positive + self.true_negative + self.false_negative


def count_yes_no(answers: Iterable[str | None], labels: Iterable[str]) -> YesNo:
    """Counts of yes/no answers against yes/no labels; no answer (None) counts as the wrong one."""
    pairs = [
        (answer if answer is not None else ("no" if label == "yes" else "yes"), label)
        for answer, label in zip(answers, labels, strict=True)
    ]
    return YesNo(
        true_positive=pairs.count(("yes", "yes")),
        false_positive=pairs.count(("yes", "no")),
        true_negative=pairs.count(("no", "no")),
        false_negative=pairs.count(("no", "yes")),
    )


def mme_pairs(correct: Sequence[bool], images: Sequence[str]) -> list[tuple[int, bool]]:
    """Per image, in order of appearance: how many of its questions are answered right, and whether both are.

    MME asks two questions about each image; where the twin is missing, both cannot be right.
    """
    by_image: dict[str, list[bool]] = {}
    for right, image in zip(correct, images, strict=True):
        by_image.setdefault(image, []).append(right)
    return [(sum(rights), len(rights) >= 2 and all(rights)) for rights in by_image.values()]


def mme_score(correct: Sequence[bool], images: Sequence[str]) -> tuple[float, float]:
    """MME's accuracy (of questions) and accuracy+ (of images with both questions right), in 0..1."""
    pairs = mme_pairs(correct, images)
    return sum(correct) / len(correct), sum(both for _, both in pairs) / len(pairs)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
