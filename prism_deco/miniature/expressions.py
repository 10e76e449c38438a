"""Boxes as text, spatial relations, and the three flavours of referring expressions.

The flavours follow RefCOCO (location words allowed), RefCOCO+ (appearance only) and RefCOCOg (whole sentences).
Every expression fits exactly one thing of the scene, with a safety margin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prism_deco.miniature.scene import BINS, IMAGE_SIZE, STEP, Box, Thing

CLEAR = 8
"""Smallest distance in pixels at which one centre counts as further left (or higher) than another."""

# Relation of a first box to a second one: the axis, and whether the first box comes first along it.
RELATIONS = {"to the left of": (0, True), "to the right of": (0, False), "above": (1, True), "below": (1, False)}
_EXTREMES = {"left": (0, True), "right": (0, False), "top": (1, True), "bottom": (1, False)}


class Description(NamedTuple):
    """A description of a thing; None leaves an attribute out."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.color, self.shape or "shape")))

    def fits(self, thing: Thing) -> bool:
        """Whether the description is true of the thing."""
        return (
            self.size in (None, thing.size_word)
            and self.color in (None, thing.color)
            and self.shape in (None, thing.shape)
        )

    def matches(self, things: Sequence[Thing]) -> list[Thing]:
        """The things that the description fits."""
        return [thing for thing in things if self.fits(thing)]


def box_text(box: Box) -> str:
    """The box as fractions of the image's side, for example "[0.25, 0.50, 0.69, 0.94]".

    Edges are multiples of 1/32, whose 33 values differ in two decimals, so a tokenizer can have one token for each.
    """
    return "[" + ", ".join(f"{edge // STEP / BINS:.2f}" for edge in box) + "]"


def clearly(relation: str, box: Box, other: Box) -> bool:
    """Whether `box` lies to that side of `other` without sharing a row (or column) with it."""
    axis, first = RELATIONS[relation]
    # Along an axis a box begins at `axis` and ends at `axis + 2`, exclusive.
    return box[axis + 2] <= other[axis] if first else other[axis + 2] <= box[axis]


def roughly(relation: str, box: Box, other: Box) -> bool:
    """Whether the centre of `box` lies to that side of the centre of `other`."""
    axis, first = RELATIONS[relation]
    ahead = _middle(other, axis) - _middle(box, axis)
    return ahead > 0 if first else ahead < 0


def is_only_one(relation: str, thing: Thing, anchor: Thing, rivals: Sequence[Thing]) -> bool:
    """Whether `thing` clearly has that relation to the anchor and no rival has it even roughly."""
    return clearly(relation, thing.box, anchor.box) and not any(
        rival is not thing and rival is not anchor and roughly(relation, rival.box, anchor.box) for rival in rivals
    )


def refcoco(things: Sequence[Thing], target: Thing) -> Iterator[str]:
    """Short expressions, with location words if they distinguish the target: "the left red circle"."""
    for description in _descriptions(target, sizes=False):
        matches = description.matches(things)
        if len(matches) == 1 and description != Description():
            yield f"the {description}"
        rivals = [thing for thing in matches if thing is not target]
        for word, (axis, first) in _EXTREMES.items():
            own = _middle(target.box, axis)
            # By how much the target is ahead of each rival, in half pixels, as `_middle` is twice the centre.
            leads = [_middle(r.box, axis) - own if first else own - _middle(r.box, axis) for r in rivals]
            if rivals and min(leads) >= 2 * CLEAR:
                yield f"the {word} {description}"


def refcoco_plus(things: Sequence[Thing], target: Thing) -> Iterator[str]:
    """Expressions of appearance only: "the small red circle"."""
    for description in _descriptions(target, sizes=True):
        if description != Description() and len(description.matches(things)) == 1:
            yield f"the {description}"


def refcocog(things: Sequence[Thing], target: Thing) -> Iterator[str]:
    """Sentences that refer to another thing: "the red circle that is to the left of the blue square"."""
    for anchor in things:
        if anchor is target:
            continue
        # The anchor needs a name that fits nothing else: with its size only if necessary, or it is skipped.
        name = Description(color=anchor.color, shape=anchor.shape)
        if len(name.matches(things)) > 1:
            name = Description(anchor.size_word, anchor.color, anchor.shape)
            if len(name.matches(things)) > 1:
                continue
        for relation in RELATIONS:
            if clearly(relation, target.box, anchor.box):
                for description in _descriptions(target, sizes=True):
                    if is_only_one(relation, target, anchor, description.matches(things)):
                        yield f"the {description} that is {relation} the {name}"


def halves(box: Box) -> Iterator[tuple[str, str]]:
    """The side of the image on which a box clearly lies, per axis, as ("left or right", "left")."""
    for axis, words in enumerate((("left", "right"), ("top", "bottom"))):
        # Twice the distance from the image's centre.
        offset = _middle(box, axis) - IMAGE_SIZE
        if abs(offset) >= CLEAR:
            yield f"{words[0]} or {words[1]}", words[offset > 0]


def _middle(box: Box, axis: int) -> int:
    """Twice the centre of a box along an axis, in pixels: an integer."""
    return box[axis] + box[axis + 2]


def _descriptions(thing: Thing, sizes: bool) -> list[Description]:
    # Every combination of attributes, each left out or named.
    return [
        Description(size, color, shape)
        for size in ((None, thing.size_word) if sizes else (None,))
        for color in (None, thing.color)
        for shape in (None, thing.shape)
    ]
