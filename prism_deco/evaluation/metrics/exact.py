"""Normalisation of an output before its exact match with one short answer (GQA)."""

from __future__ import annotations

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def strip_all_punctuation(prediction: str) -> str:
    """PRISM harness: deletes ASCII punctuation, lower-cases. An answer with a hyphen can never match."""
    return prediction.translate(_NO_PUNCTUATION).lower()


def strip_trailing_period(prediction: str) -> str:
    """LLaVA: removes periods at the end, lower-cases."""
    return prediction.rstrip(".").lower()
