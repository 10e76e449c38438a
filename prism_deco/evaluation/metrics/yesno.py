"""Yes/no questions: parsing and scoring answers (POPE, MME)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def parse_pope(output: str) -> str:
    """LLaVA's parser: "no" if the first sentence contains the word No, no or not, otherwise "yes".

    Words are separated by single spaces, so that "no\\n" does not count as no.
    """
    words = output.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def says_yes_or_no(output: str) -> bool:
    """Whether the output contains yes, no or not at all; `parse_pope` silently treats other outputs as a yes."""
    return re.search(r"\b(yes|no|not)\b", output, re.IGNORECASE) is not None


def parse_mme(output: str) -> str | None:
    """MME's parser: the output if it is yes or no, otherwise the one in its first four characters, or None."""
    text = output.lower()
    if text in ("yes", "no"):
        return text
    return next((answer for answer in ("yes", "no") if answer in text[:4]), None)


def yes_no_rates(answers: Iterable[str | None], labels: Iterable[str]) -> dict[str, float]:
    """Accuracy, F1, precision, recall and the share of "yes", 0..1 each; "yes" is the positive class.

    A missing answer (None) counts as the wrong one. Undefined ratios are 0, where the scripts would divide by zero.
    """
    # (answer, label), where a missing answer is the opposite of the label.
    pairs = [
        (answer if answer is not None else ("no" if label == "yes" else "yes"), label)
        for answer, label in zip(answers, labels, strict=True)
    ]
    true_positive = pairs.count(("yes", "yes"))
    false_positive = pairs.count(("yes", "no"))
    true_negative = pairs.count(("no", "no"))
    false_negative = pairs.count(("no", "yes"))
    total = true_positive + false_positive + true_negative + false_negative
    precision = _ratio(true_positive, true_positive + false_positive)
    recall = _ratio(true_positive, true_positive + false_negative)
    return {
        "accuracy": _ratio(true_positive + true_negative, total),
        "f1": _ratio(2 * precision * recall, precision + recall),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _ratio(true_positive + false_positive, total),
    }


def mme_pairs(correct: Sequence[bool], images: Sequence[str]) -> list[tuple[int, bool]]:
    """Per image, in order of appearance: the number of correct answers, and whether both are correct.

    MME asks two questions about each image. If one is missing, the pair does not count as correct.
    """
    by_image: dict[str, list[bool]] = {}
    for right, image in zip(correct, images, strict=True):
        by_image.setdefault(image, []).append(right)
    return [(sum(rights), len(rights) >= 2 and all(rights)) for rights in by_image.values()]


def mme_score(correct: Sequence[bool], images: Sequence[str]) -> tuple[float, float]:
    """MME's accuracy (over questions) and accuracy+ (over images, both questions correct), in 0..1."""
    pairs = mme_pairs(correct, images)
    return sum(correct) / len(correct), sum(both for _, both in pairs) / len(pairs)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
