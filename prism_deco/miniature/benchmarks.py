"""Selects the questions of the benchmarks about the images of a split."""

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
    """The images of a split and the size of its benchmarks: image i shows `pools[i].scene`."""

    seed: int
    name: str
    pools: list[Pool]
    items: int
    """Most questions per benchmark; fewer if images run out."""

    def dice(self, *key: object) -> Dice:
        """An independent random stream per key."""
        return Dice(self.seed, self.name, "benchmark", *key)

    def shuffled(self, dice: Dice) -> list[int]:
        """The indices of all images in random order."""
        order = list(range(len(self.pools)))
        dice.shuffle(order)
        return order


def one_per_image(split: Split, task: str) -> Iterator[tuple[int, Question]]:
    """Questions of a task with the index of their image; skips images that allow none."""
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
        # Only one expression if a single item is left.
        questions = [first, *([dice.pick(others)] if others else [])][:left]
        if not questions:
            return
        left -= len(questions)
        yield index, questions


def pope_subsets(split: Split) -> dict[str, list[tuple[int, Question]]]:
    """As many yes as no questions per subset, one of each per image.

    As in POPE, absent things are random ones, popular ones (from the more frequent half of the categories), or
    adversarial ones, whose colour and shape are both in the image.
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
    # One family per answer. They share the counts per question, so the asked category does not predict the answer.
    yes, no = (
        replace(base, make=partial(_only, answer=answer, absent=absent), contrast=False) for answer in ("Yes", "No")
    )
    chosen: list[tuple[int, Question]] = []
    # Three subsets with two questions per image share the items.
    for index in split.shuffled(dice)[: split.items // 6]:
        scene = split.pools[index].scene
        for template in (yes, no):
            # A fresh pool, since pools cache questions by the family's name and both families have the same.
            question = balance.ask(template, Pool(scene), dice)
            if question is not None:
                chosen.append((index, question))
    return chosen


def _only(
    template: Template, scene: Scene, answer: str, absent: Callable[[Scene], Collection[str]]
) -> Iterator[Question]:
    return (question for question in category_exists(template, scene, absent) if question.answer == answer)
