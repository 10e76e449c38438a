"""All families of questions. Each yields every question that it has about a scene, without selection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from prism_deco.miniature import expressions
from prism_deco.miniature.questions import Fact, Question, Template
from prism_deco.miniature.scene import CATEGORIES, COLORS, SHAPES, Scene, Thing

UNANSWERABLE = "unanswerable"
YES_NO = {"Yes": 1, "No": 1}

_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


def confusable(scene: Scene) -> set[str]:
    """Absent categories whose colour and shape are both in the scene, or else those with exactly one."""
    seen = {thing.category for thing in scene.things}
    colors, shapes = {thing.color for thing in scene.things}, {thing.shape for thing in scene.things}
    crossed = {f"{color} {shape}" for color in colors for shape in shapes} - seen
    # Comparing two booleans by `!=` is an exclusive or.
    return crossed or {c for c in CATEGORIES if (c.split()[0] in colors) != (c.split()[1] in shapes)}


def category_exists(template: Template, scene: Scene, absent: Callable[[Scene], Collection[str]]) -> Iterator[Question]:
    """ "Is there a red circle?" for every category in the scene and those that `absent` proposes."""
    seen = {thing.category for thing in scene.things}
    for category in sorted(seen.union(absent(scene))):
        color, shape = category.split()
        # The number of red things or of circles may give away whether there is a red circle.
        facts = [("category", category), ("count", color), ("count", shape)]
        facts += _what(thing for thing in scene.things if thing.category == category)
        yield template.question(f"Is there a {category} in the image?", "Yes" if category in seen else "No", facts)


def _shape_exists(template: Template, scene: Scene) -> Iterator[Question]:
    for shape in SHAPES:
        found = [thing for thing in scene.things if thing.shape == shape]
        facts = [("count", shape), *_what(found)]
        yield template.question(f"Is there a {shape} in the image?", "Yes" if found else "No", facts)


def _count(template: Template, scene: Scene) -> Iterator[Question]:
    # A named thing narrows down a count, and one count narrows down others.
    asks = [("counts",), *_what(scene.things)]
    for kind in SHAPES + COLORS:
        count = sum(kind in (thing.shape, thing.color) for thing in scene.things)
        text = f"How many {_PLURALS.get(kind, f'{kind} shapes')} are there?"
        yield template.question(text, str(count), asks, reveals=[("counts",), ("count", kind)])


def _count_all(template: Template, scene: Scene) -> Iterator[Question]:
    asks = [("counts",), *_what(scene.things)]
    yield template.question("How many shapes are there?", str(len(scene.things)), asks, reveals=[("counts",)])


def _attribute(template: Template, scene: Scene, of: str) -> Iterator[Question]:
    """The colour of the only circle, or the shape of the only red thing; unanswerable if there is none."""
    for name in SHAPES if of == "color" else COLORS:
        found = [thing for thing in scene.things if name in (thing.shape, thing.color)]
        facts = [("count", name), *_what(found)]
        text = f"What color is the {name}?" if of == "color" else f"Which shape is {name}?"
        if len(found) == 1:
            answer = found[0].color if of == "color" else found[0].shape
            side = "answerable" if UNANSWERABLE in template.sides else answer
            yield template.question(text, answer, facts, side=side)
        elif not found and UNANSWERABLE in template.sides:
            yield template.question(text, UNANSWERABLE, facts)


def _plate(template: Template, scene: Scene, texts: Sequence[str]) -> Iterator[Question]:
    for text in texts:
        if scene.plate is not None:
            side = "answerable" if UNANSWERABLE in template.sides else None
            yield template.question(text, str(scene.plate.number), [("plate",)], side=side)
        elif UNANSWERABLE in template.sides:
            yield template.question(text, UNANSWERABLE, [("plate",)])


def _relation(template: Template, scene: Scene) -> Iterator[Question]:
    for first, second in _pairs(scene):
        for relation, (axis, _) in expressions.RELATIONS.items():
            # Asked only if the relation or its reverse clearly holds, so that "No" is as safe as "Yes".
            yes = expressions.clearly(relation, first.box, second.box)
            if yes or expressions.clearly(relation, second.box, first.box):
                text = f"Is the {first.category} {relation} the {second.category}?"
                yield _compare(template, text, yes, first, second, axis)


def _larger(template: Template, scene: Scene) -> Iterator[Question]:
    for first, second in _pairs(scene):
        if first.size_word != second.size_word:
            for word, yes in (("larger", first.size > second.size), ("smaller", first.size < second.size)):
                text = f"Is the {first.category} {word} than the {second.category}?"
                yield _compare(template, text, yes, first, second, "size")


def _compare(template: Template, text: str, yes: bool, first: Thing, second: Thing, by: object) -> Question:
    # Unordered: comparing the second with the first would give the same fact away.
    pair = ("pair", by, frozenset((first.box, second.box)))
    asks = [pair, ("box", first.box), ("box", second.box)]
    return template.question(text, "Yes" if yes else "No", asks, reveals=[pair, *_what((first, second))])


def _side_of_image(template: Template, scene: Scene) -> Iterator[Question]:
    for thing in _unique(scene):
        for words, answer in expressions.halves(thing.box):
            fact = ("half", words, thing.box)
            text = f"Is the {thing.category} on the {words} side of the image?"
            yield template.question(text, answer, [fact, ("box", thing.box)], reveals=[fact, *_what([thing])])


def _neighbour_color(template: Template, scene: Scene) -> Iterator[Question]:
    for target, anchor in _pairs(scene, unique_first=False):
        # Scenes repeat colours: the anchor's colour would be the best blind guess.
        if target.color == anchor.color:
            continue
        for relation in expressions.RELATIONS:
            if expressions.is_only_one(relation, target, anchor, scene.things):
                text = f"What color is the shape {relation} the {anchor.category}?"
                facts = _what([target])
                yield template.question(text, target.color, facts, reveals=facts + _what([anchor]))


def _referring(
    template: Template, scene: Scene, describe: Callable[[Sequence[Thing], Thing], Iterable[str]]
) -> Iterator[Question]:
    for thing in scene.things:
        facts: list[Fact] = [("box", thing.box)]
        for text in describe(scene.things, thing):
            # A sentence that refers to another thing also locates it.
            named = [other for other in scene.things if other is thing or text.endswith(other.category)]
            reveals = facts + [("box", other.box) for other in named] + _what(named)
            yield template.question(text, expressions.box_text(thing.box), facts, reveals=reveals, target=thing)


def _region(template: Template, scene: Scene) -> Iterator[Question]:
    for thing in scene.things:
        reveals = [("box", thing.box), *_what([thing])]
        text = expressions.box_text(thing.box)
        yield template.question(text, thing.category, _what([thing]), reveals=reveals, target=thing)


def _what(things: Iterable[Thing]) -> list[Fact]:
    """The facts that these things exist, with colour and shape. Their boxes, which are unique, identify them."""
    return [("what", thing.box) for thing in things]


def _unique(scene: Scene) -> list[Thing]:
    """The things whose category is unique in the scene."""
    categories = [thing.category for thing in scene.things]
    return [thing for thing in scene.things if categories.count(thing.category) == 1]


def _pairs(scene: Scene, unique_first: bool = True) -> Iterator[tuple[Thing, Thing]]:
    """Ordered pairs of things; the second (and by default the first) has a unique category."""
    unique = _unique(scene)
    for first in unique if unique_first else scene.things:
        yield from ((first, second) for second in unique if second is not first)


_PLATE_TEXTS = ("What number is on the plate?", "What does the plate say?")
_ANSWERABLE = {"answerable": 3, UNANSWERABLE: 2}
_HALVES = {"left": 1, "right": 1, "top": 1, "bottom": 1}
_COLOR_SIDES, _SHAPE_SIDES = dict.fromkeys(COLORS, 1), dict.fromkeys(SHAPES, 1)

# In the order of `Template`: name, task, make, sides, contrast, weight, stage.
TEMPLATES = (
    Template("exists", "pope", partial(category_exists, absent=lambda _: CATEGORIES), YES_NO, True, 10),
    Template("exists_confusable", "pope", partial(category_exists, absent=confusable), YES_NO, True, 20),
    Template("shape_exists", "vqav2", _shape_exists, YES_NO, True, 6),
    Template("count", "vqav2", _count, dict.fromkeys("0123", 1), weight=15, stage=0),
    Template("count_all", "vqav2", _count_all, dict.fromkeys("123", 1), weight=4, stage=0),
    Template("color", "vqav2", partial(_attribute, of="color"), _COLOR_SIDES, weight=10),
    Template("shape", "vqav2", partial(_attribute, of="shape"), _SHAPE_SIDES, weight=10),
    Template("relation", "gqa", _relation, YES_NO, True, 14),
    Template("larger", "gqa", _larger, YES_NO, True, 10),
    Template("side_of_image", "gqa", _side_of_image, _HALVES, weight=4),
    Template("neighbour_color", "gqa", _neighbour_color, _COLOR_SIDES, weight=8),
    Template("maybe_color", "vizwiz", partial(_attribute, of="color"), _ANSWERABLE, True, 8),
    Template("maybe_shape", "vizwiz", partial(_attribute, of="shape"), _ANSWERABLE, True, 8),
    Template("maybe_plate", "vizwiz", partial(_plate, texts=_PLATE_TEXTS), _ANSWERABLE, weight=8),
    Template("plate", "textvqa", partial(_plate, texts=_PLATE_TEXTS), weight=18),
    Template("refcoco", "refcoco", partial(_referring, describe=expressions.refcoco), weight=14, stage=2),
    Template("refcoco+", "refcoco+", partial(_referring, describe=expressions.refcoco_plus), weight=14, stage=2),
    Template("refcocog", "refcocog", partial(_referring, describe=expressions.refcocog), weight=14, stage=2),
    Template("region", "region", _region, weight=14, stage=2),
)
