"""Exact match with one short answer (GQA)."""

from __future__ import annotations

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def strip_all_punctuation(prediction: str) -> str:
    """The PRISM harness: ASCII punctuation deleted, lower-cased. Answers with a hyphen cannot be met."""
    return prediction.translate(_NO_PUNCTUATION).lower()


def strip_trailing_period(prediction: str) -> str:
    """LLaVA: periods at the end removed, lower-cased."""
    return prediction.rstrip(".").lower()


def exact_match(prediction: str, answer: str) -> float:
    """1 where they are the same string, else 0."""
    return float(prediction == answer)
