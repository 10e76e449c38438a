"""Chooses the questions that the benchmarks ask about the images of one split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from prism_deco.miniature.conversations import Balance, Pool
from prism_deco.miniature.questions import Question, Template
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import CATEGORIES, Scene
from prism_deco.miniature.templates import TEMPLATES, category_exists, confusable


@dataclass(frozen=True)
class Split:
    """Images to ask about: image i shows `pools[i].scene`."""

    seed: int
    name: str
    pools: list[Pool]
    items: int
    """Questions per benchmark; images run out first where there are few."""

    def dice(self, *key: object) -> Dice:
        """A stream of its own for each use."""
        return Dice(self.seed, self.name, "benchmark", *key)

    def shuffled(self, dice: Dice) -> list[int]:
        """The images in the order in which a benchmark asks about them."""
        order = list(range(len(self.pools)))
        dice.shuffle(order)
        return order


def one_per_image(split: Split, task: str) -> Iterator[tuple[int, Question]]:
    """Questions of a task, with their images; images that allow none are passed over."""
    templates = [template for template in TEMPLATES if template.task == task]
    dice, balance = split.dice(task), Balance()
    left = split.items
    for index in split.shuffled(dice):
        question = balance.ask_any(templates, split.pools[index], dice) if left else None
        if question is not None:
            left -= 1
            yield index, question


def expressions_per_thing(split: Split, task: str) -> Iterator[tuple[int, list[Question]]]:
    """Up to two referring expressions for one thing per image."""
    (template,) = (template for template in TEMPLATES if template.task == task)
    dice = split.dice(task, "second expression")
    left = split.items
    for index, first in one_per_image(split, task):
        others = [q for q in split.pools[index].of(template) if q.target == first.target and q != first]
        questions = [first, *([dice.pick(others)] if others else [])][:left]
        if not questions:
            return
        left -= len(questions)
        yield index, questions


def pope_subsets(split: Split) -> dict[str, list[tuple[int, Question]]]:
    """As many yes as no questions per subset, one of each per image.

    The absent things are (as in POPE) random ones, frequent ones (of the more frequent half of the categories),
    or ones that the image suggests: there they share a colour and a shape with what is seen.
    """
    counts = Counter(thing.category for pool in split.pools for thing in pool.scene.things)
    popular = set(sorted(CATEGORIES, key=lambda category: -counts[category])[: len(CATEGORIES) // 2])
    absent: dict[str, Callable[[Scene], Collection[str]]] = {
        "random": lambda _: CATEGORIES,
        "popular": lambda _: popular,
        "adversarial": confusable,
    }
    return {subset: _yes_and_no(split, subset, propose) for subset, propose in absent.items()}


def _yes_and_no(split: Split, subset: str, absent: Callable[[Scene], Collection[str]]) -> list[tuple[int, Question]]:
    (base,) = (template for template in TEMPLATES if template.name == "exists")
    dice, balance = split.dice("pope", subset), Balance()
    # Families of one answer each that share the counts by question: the word asked for tells nothing.
    yes, no = (
        replace(base, make=partial(_only, answer=answer, absent=absent), contrast=False) for answer in ("Yes", "No")
    )
    chosen: list[tuple[int, Question]] = []
    for index in split.shuffled(dice)[: split.items // 6]:
        scene = split.pools[index].scene
        for template in (yes, no):
            # The pool keeps one list per family's name, hence a fresh one.
            question = balance.ask(template, Pool(scene), dice)
            if question is not None:
                chosen.append((index, question))
    return chosen


def _only(
    template: Template, scene: Scene, answer: str, absent: Callable[[Scene], Collection[str]]
) -> Iterator[Question]:
    return (question for question in category_exists(template, scene, absent) if question.answer == answer)
