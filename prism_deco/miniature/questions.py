"""Questions: text, answer, the facts that both reveal, and the prompt in the words of LLaVA's data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prism_deco.miniature.scene import Scene, Thing

Fact = tuple[object, ...]

_SHORT = "{}\nAnswer the question using a single word or phrase."
_BOX = "Please provide the bounding box coordinate of the region this sentence describes: {}."
PROMPTS = {
    "pope": _SHORT,
    "vqav2": _SHORT,
    "gqa": _SHORT,
    "textvqa": _SHORT,
    # Formatting it here leaves a placeholder for the question, in front of the additional sentence.
    "vizwiz": _SHORT.format("{}\nWhen the provided information is insufficient, respond with 'Unanswerable'."),
    "refcoco": _BOX,
    "refcoco+": _BOX,
    "refcocog": _BOX,
    "region": "Please provide a short description for this region: {}.",
    "caption": "{}",
}
"""The prompt template of each task, worded as in LLaVA's training data."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one scene."""

    task: str
    template: str
    text: str
    """The bare question, expression or box."""
    answer: str
    side: str = ""
    """The class of the answer for balancing; empty if answers are not balanced."""
    asks: frozenset[Fact] = frozenset()
    """Facts that give away the answer: no earlier turn may reveal one of them."""
    reveals: frozenset[Fact] = frozenset()
    """Facts that question and answer reveal."""
    target: Thing | None = None
    """The thing whose box or description is asked for."""

    @property
    def prompt(self) -> str:
        """The question as worded in a conversation."""
        return PROMPTS[self.task].format(self.text)


@dataclass(frozen=True, slots=True)
class Template:
    """A family of questions whose answers are balanced against each other."""

    name: str
    task: str
    make: Callable[[Template, Scene], Iterator[Question]]
    """Yields all questions of the family about a scene."""
    sides: Mapping[str, int] = field(default_factory=dict)
    """Relative shares of the classes of answers; empty if answers are not balanced."""
    contrast: bool = False
    """Draw one of two sides, and ask only if both are possible, so that earlier turns do not hint at the answer."""
    weight: int = 10
    """Relative frequency in conversations."""
    stage: int = 1
    """Conversations ask lower stages first, since higher ones reveal more."""

    def question(
        self,
        text: str,
        answer: str,
        asks: Iterable[Fact],
        reveals: Iterable[Fact] | None = None,
        side: str | None = None,
        target: Thing | None = None,
    ) -> Question:
        """A question of this family. By default it reveals the facts that it asks, and its answer is its side."""
        side = (answer if self.sides else "") if side is None else side
        asks = frozenset(asks)
        reveals = asks if reveals is None else frozenset(reveals)
        return Question(self.task, self.name, text, answer, side, asks, reveals, target)
