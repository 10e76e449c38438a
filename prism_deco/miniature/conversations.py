"""Selects questions with balanced answers, and joins them to conversations in which no turn gives away a later one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from typing import Any

from prism_deco.miniature.questions import Fact, Question, Template
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import IMAGE_SIZE, Box, Scene, draw_scene
from prism_deco.miniature.templates import TEMPLATES

TURNS = 5
_TRIES = 20
_CAPTION_PERCENT = 10
_TEXT_PERCENT = 5
_SLACK = 4
"""How many questions a class of answers may exceed its share by."""

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."
_BY_NAME = {template.name: template for template in TEMPLATES}
_FROM_CAPTION = [_BY_NAME[name] for name in ("count", "count_all", "color", "shape")]
# Each family as often as its weight says, so that a uniform draw is a weighted one.
_DRAWS = [template for template in TEMPLATES for _ in range(template.weight)]


class Pool:
    """All questions about a scene, by family; each family is generated once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._questions: dict[str, list[Question]] = {}

    def of(self, template: Template) -> list[Question]:
        """The questions of a family."""
        if template.name not in self._questions:
            self._questions[template.name] = list(template.make(template, self.scene))
        return self._questions[template.name]


class Balance:
    """Selects questions about successive scenes and keeps the answers to each question equally frequent.

    A model that sees the question but not the image should do no better than chance.
    """

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def ask(self, template: Template, pool: Pool, dice: Dice, revealed: Set[Fact] = frozenset()) -> Question | None:
        """A question of that family, or None if the scene, the balance or the `revealed` facts allow none."""
        candidates = [question for question in pool.of(template) if revealed.isdisjoint(question.asks)]
        if template.contrast:
            if len({question.side for question in candidates}) < 2:
                return None
            drawn = dice.pick([side for side, share in template.sides.items() for _ in range(share)])
            candidates = [question for question in candidates if question.side == drawn]
        elif template.sides:
            # In the scaled units of `_excess`.
            slack = _SLACK * sum(template.sides.values())
            candidates = [q for q in candidates if self._excess(template, "", q.side) <= slack]
        if not candidates:
            return None
        dice.shuffle(candidates)
        if not template.sides:
            return candidates[0]
        # After the shuffle, ties are broken at random.
        chosen = min(
            candidates,
            key=lambda q: (self._excess(template, q.text, q.side), self._excess(template, "", q.side)),
        )
        self._counts[template.name, chosen.text][chosen.side] += 1
        self._counts[template.name, ""][chosen.side] += 1
        return chosen

    def ask_any(self, templates: Sequence[Template], pool: Pool, dice: Dice) -> Question | None:
        """A question of one of these families, drawn by weight; None if all fail."""
        draws = [template for template in templates for _ in range(template.weight)]
        dice.shuffle(draws)
        # Each family at its first place in the shuffled draws: heavy ones tend to come first.
        order = {template.name: template for template in draws}.values()
        for template in order:
            question = self.ask(template, pool, dice)
            if question is not None:
                return question
        return None

    def _excess(self, template: Template, text: str, side: str) -> int:
        """By how much a class exceeds its share of the answers to a text (to the family, if it is empty).

        Scaled by the sum of shares, to stay with integers.
        """
        counts = self._counts[template.name, text]
        return counts[side] * sum(template.sides.values()) - counts.total() * template.sides[side]


def caption(scene: Scene) -> str:
    """Names everything in the scene: "a small red circle at the top left and a plate in the middle that says 47"."""
    parts = [f"a {thing.size_word} {thing.category} {_place(thing.box)}" for thing in scene.things]
    if scene.plate is not None:
        parts.append(f"a plate {_place(scene.plate.box)} that says {scene.plate.number}")
    # "a, b and c"; a single part has nothing before the "and".
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _place(box: Box) -> str:
    """The cell of a 3x3 grid over the image that holds the middle of a box, for example "at the top left"."""
    x1, y1, x2, y2 = box
    # The third of the side that holds the middle (y1 + y2) / 2, in integers.
    row = ("top", "", "bottom")[(y1 + y2) * 3 // (2 * IMAGE_SIZE)]
    column = ("left", "", "right")[(x1 + x2) * 3 // (2 * IMAGE_SIZE)]
    words = f"{row} {column}".strip()
    return f"at the {words}" if words else "in the middle"


def converse(pool: Pool, dice: Dice, balance: Balance) -> list[Question]:
    """Up to five questions about a scene, none answered by earlier turns; or a caption, which would answer them all."""
    if dice.chance(_CAPTION_PERCENT):
        return [Question("caption", "caption", CAPTION_REQUEST, caption(pool.scene))]
    draws = [dice.pick(_DRAWS) for _ in range(_TRIES)]
    # The first five are asked in the order of their stages; the others replace those that find no question.
    draws[:TURNS] = sorted(draws[:TURNS], key=lambda template: template.stage)
    turns: list[Question] = []
    revealed: set[Fact] = set()
    for template in draws:
        question = balance.ask(template, pool, dice, revealed)
        if question is not None:
            turns.append(question)
            revealed |= question.reveals
        if len(turns) == TURNS:
            break
    return turns


def records(seed: int, split: str, scenes: Sequence[tuple[str, Scene]], per_image: int) -> Iterator[dict[str, Any]]:
    """LLaVA records about images, interspersed with text-only ones.

    Args:
        scenes: the path of each image (relative to the image root) and its scene.
        per_image: conversations about each image.
    """
    balance, text_balance = Balance(), Balance()
    texts = 0
    for index, (path, scene) in enumerate(scenes):
        pool, dice = Pool(scene), Dice(seed, split, index, "questions")
        for repeat in range(per_image):
            turns = [(question.prompt, question.answer) for question in converse(pool, dice, balance)]
            if turns:
                yield _record(f"{split}-{index:06d}-{repeat}", turns, path)
            if dice.chance(_TEXT_PERCENT):
                yield _record(f"{split}-text-{texts:06d}", _read(seed, split, texts, text_balance))
                texts += 1


def caption_records(split: str, scenes: Sequence[tuple[str, Scene]]) -> Iterator[dict[str, Any]]:
    """LLaVA records with one caption per image (`scenes` as in `records`)."""
    for index, (path, scene) in enumerate(scenes):
        yield _record(f"{split}-caption-{index:06d}", [(CAPTION_REQUEST, caption(scene))], path)


def _read(seed: int, split: str, index: int, balance: Balance) -> list[tuple[str, str]]:
    """Text-only turns; each describes a scene of its own and asks about the description."""
    dice = Dice(seed, split, index, "text questions")
    turns = []
    for turn in range(3):
        pool = Pool(draw_scene(seed, f"{split} text", 3 * index + turn))
        question = balance.ask_any(_FROM_CAPTION, pool, dice)
        if question is not None:
            turns.append((f"There is {caption(pool.scene)}. {question.prompt}", question.answer))
    return turns


def _record(name: str, turns: Sequence[tuple[str, str]], image: str | None = None) -> dict[str, Any]:
    conversations = []
    for prompt, answer in turns:
        # The image belongs to the first question.
        opening = "<image>\n" if image is not None and not conversations else ""
        conversations += [{"from": "human", "value": opening + prompt}, {"from": "gpt", "value": answer}]
    return {"id": name} | ({} if image is None else {"image": image}) | {"conversations": conversations}
