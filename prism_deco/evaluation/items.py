"""The data of an evaluation: questions as read, items as asked, predictions as written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One way to ask a benchmark's questions."""

    template: str
    """The prompt, with `Question.fields` as fields."""
    likelihood: bool = False
    """Compare the probabilities of the possible answers instead of generating text."""


@dataclass(frozen=True)
class Question:
    """One question as read from a benchmark's files."""

    question_id: str
    images: tuple[str, ...]
    """Paths of its images below the root, as predictions record them; empty for a text-only question."""
    paths: tuple[Path, ...]
    """The image files."""
    fields: Mapping[str, str]
    """Values for the fields of prompt templates."""
    target: dict[str, Any]
    """What scoring needs, as JSON."""
    stratum: str = ""
    """Part of the benchmark (a subset, a task), from which a limit must keep questions."""
    group: str = ""
    """Questions of one group are scored together, so a limit must not split them. Empty: a group of its own."""


@dataclass(frozen=True)
class Item:
    """A question as one variant asks it."""

    question_id: str
    images: tuple[str, ...]
    paths: tuple[Path, ...]
    prompt: str
    target: dict[str, Any]
    choices: tuple[str, ...] = ()
    """The answers whose probabilities are compared; empty generates text."""

    @property
    def image(self) -> str | list[str]:
        """The image as predictions record it; a list unless there is exactly one."""
        return self.images[0] if len(self.images) == 1 else list(self.images)


@dataclass(frozen=True)
class Prediction:
    """A line of `predictions.jsonl`."""

    question_id: str
    image: str | list[str]
    """Path of the image below the benchmark's root; a list unless there is exactly one."""
    prompt: str
    output: str | None
    """The generated text, or a JSON object of choice probabilities; None if the image was unreadable."""
    answer: Any
    """The output as parsed by the benchmark, as JSON; None if it cannot be parsed."""
    target: dict[str, Any]
    score: float
    """0..1."""

    @property
    def text(self) -> str:
        """The stripped output; all reference harnesses strip what they decode."""
        return (self.output or "").strip()


def cut(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At least `limit` questions, since groups are kept whole, taken in turn from the strata; in the given order."""
    if limit is None or limit >= len(questions):
        return list(questions)
    # By stratum, by group: the indices of the questions. A question without a group gets one of its own.
    strata: dict[str, dict[str, list[int]]] = {}
    for index, question in enumerate(questions):
        groups = strata.setdefault(question.stratum, {})
        groups.setdefault(question.group or f"#{index}", []).append(index)
    # Reversed, so that `pop` takes the groups in their order.
    queues = [list(groups.values())[::-1] for groups in strata.values()]
    chosen: list[int] = []
    while len(chosen) < limit:
        for queue in queues:
            if queue and len(chosen) < limit:
                chosen += queue.pop()
    return [questions[index] for index in sorted(chosen)]


def most_common(values: Iterable[str], count: int = 5) -> list[str]:
    """The most frequent values, most frequent first; ties in order of appearance."""
    return [value for value, _ in Counter(values).most_common(count)]


def mean_score(predictions: Sequence[Prediction]) -> float:
    """Mean score in per cent."""
    return 100 * sum(prediction.score for prediction in predictions) / len(predictions)


def by_part(predictions: Iterable[Prediction], key: str) -> dict[str, list[Prediction]]:
    """Predictions by the value of a key of their target, in order of appearance."""
    parts: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        parts.setdefault(str(prediction.target[key]), []).append(prediction)
    return parts
