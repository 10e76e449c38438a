"""What a question is: its text, its answer, what both give away, and how LLaVA's data words its prompt."""

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
    "vizwiz": _SHORT.format("{}\nWhen the provided information is insufficient, respond with 'Unanswerable'."),
    "refcoco": _BOX,
    "refcoco+": _BOX,
    "refcocog": _BOX,
    "region": "Please provide a short description for this region: {}.",
    "caption": "{}",
}
"""The prompt of each task around the bare question, worded as in LLaVA's training data."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one scene."""

    task: str
    template: str
    text: str
    """The bare question, expression or box."""
    answer: str
    side: str = ""
    """The class of the answer whose frequency is balanced; empty where answers are free."""
    asks: frozenset[Fact] = frozenset()
    """Facts that give the answer: no earlier turn may reveal one of them."""
    reveals: frozenset[Fact] = frozenset()
    """Facts that can be read from the question and its answer."""
    target: Thing | None = None
    """The thing whose box or description is asked."""

    @property
    def prompt(self) -> str:
        """The text as it stands in a conversation."""
        return PROMPTS[self.task].format(self.text)


@dataclass(frozen=True, slots=True)
class Template:
    """A family of questions whose answers are balanced against each other."""

    name: str
    task: str
    make: Callable[[Template, Scene], Iterator[Question]]
    """Every question of the family about a scene."""
    sides: Mapping[str, int] = field(default_factory=dict)
    """Relative shares of the classes of answers; empty where answers are free."""
    contrast: bool = False
    """Draw one of two sides, and ask only where both are possible: what was said before must not hint at the answer."""
    weight: int = 10
    """How often it is drawn for a conversation, relative to the others."""
    stage: int = 1
    """Conversations ask lower stages first, as later ones give much away."""

    def question(
        self,
        text: str,
        answer: str,
        asks: Iterable[Fact],
        reveals: Iterable[Fact] | None = None,
        side: str | None = None,
        target: Thing | None = None,
    ) -> Question:
        """A question of this family; it reveals what it asks unless told otherwise, and its answer is its side."""
        side = (answer if self.sides else "") if side is None else side
        asks = frozenset(asks)
        reveals = asks if reveals is None else frozenset(reveals)
        return Question(self.task, self.name, text, answer, side, asks, reveals, target)
