"""The content of an image in integers: coloured shapes and sometimes a plate with a number."""

from __future__ import annotations

from dataclasses import dataclass

from prism_deco.miniature.rng import Dice

IMAGE_SIZE = 64
"""Side of the square image in pixels."""

BINS = 32
"""Boxes lie on a grid with this many bins per side, so two decimals distinguish all edges."""

STEP = IMAGE_SIZE // BINS
"""Pixels per bin: every position and size is a multiple of it."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 175),
    "cyan": (50, 200, 215),
}
COLORS = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
CATEGORIES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# A pooled cell of the miniature towers is 16 px: much smaller things would vanish in the average.
# The gap between the groups separates "small" from "large".
SMALL_SIZES = (14, 16, 18)
LARGE_SIZES = (22, 24, 26)

PLATE_SIZE = (28, 20)
"""Width and height of a plate in pixels."""
PLATE_PERCENT = 60

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels; x2 and y2 are exclusive."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape that fills a square box."""

    color: str
    shape: str
    size: int
    x: int
    y: int
    tint: tuple[int, int, int]
    """Added to the palette's colour, for variation."""

    @property
    def box(self) -> Box:
        """The tight box of its pixels."""
        return self.x, self.y, self.x + self.size, self.y + self.size

    @property
    def category(self) -> str:
        """Colour and shape, for example "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def size_word(self) -> str:
        """small | large."""
        return "small" if self.size <= SMALL_SIZES[-1] else "large"


@dataclass(frozen=True, slots=True)
class Plate:
    """A white plate with a two-digit number."""

    number: int
    x: int
    y: int

    @property
    def box(self) -> Box:
        """The tight box of its pixels."""
        return self.x, self.y, self.x + PLATE_SIZE[0], self.y + PLATE_SIZE[1]


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three things and at most one plate; their boxes do not overlap."""

    things: tuple[Thing, ...]
    plate: Plate | None
    background: int
    """Grey level."""
    noise: str
    """Seed of the background's noise."""


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of that index; splits have independent random streams."""
    dice = Dice(seed, split, index)
    kinds = _draw_kinds(dice)
    number = 10 + dice.below(90) if dice.chance(PLATE_PERCENT) else None
    while True:
        sizes = [dice.pick(dice.pick((SMALL_SIZES, LARGE_SIZES))) for _ in kinds]
        # The plate comes first, if there is one, and is taken off again below.
        boxes = _place([PLATE_SIZE] * (number is not None) + [(size, size) for size in sizes], dice)
        if boxes:
            break
    plate = None if number is None else Plate(number, *boxes.pop(0))
    things = tuple(
        Thing(color, shape, size, x, y, (dice.below(21) - 10, dice.below(21) - 10, dice.below(21) - 10))
        for (color, shape), size, (x, y) in zip(kinds, sizes, boxes, strict=True)
    )
    background = (40 if dice.chance(50) else 180) + dice.below(45)
    return Scene(things, plate, background, f"{seed}/{split}/{index}")


def _draw_kinds(dice: Dice) -> list[tuple[str, str]]:
    """Colours and shapes. They often repeat, for things to count and to distinguish."""
    kinds = [(dice.pick(COLORS), dice.pick(SHAPES))]
    # Further things: none in one of eight scenes, one in three of eight, two in half of them.
    for _ in range(dice.pick((0, 1, 1, 1, 2, 2, 2, 2))):
        color, shape = dice.pick(kinds)
        # Drawn before the choice, so that every branch takes the same number of draws from the stream.
        other_color, other_shape = dice.pick(COLORS), dice.pick(SHAPES)
        repeat = dice.below(10)
        # Of ten: the colour alone in two, both in two, the shape alone in three, neither in three.
        keep_color, keep_shape = repeat in (0, 1, 2, 3), repeat in (2, 3, 4, 5, 6)
        kinds.append((color if keep_color else other_color, shape if keep_shape else other_shape))
    return kinds


def _place(sizes: list[tuple[int, int]], dice: Dice) -> list[tuple[int, int]]:
    """Corners at which boxes of these sizes are one bin apart; empty if random placement fails."""
    placed: list[Box] = []
    for width, height in sizes:
        for _ in range(20):
            x = STEP * dice.below((IMAGE_SIZE - width) // STEP + 1)
            y = STEP * dice.below((IMAGE_SIZE - height) // STEP + 1)
            x2, y2 = x + width, y + height
            # Edges are multiples of STEP, so strict inequality leaves a gap of one bin.
            if all(x > b[2] or y > b[3] or x2 < b[0] or y2 < b[1] for b in placed):
                placed.append((x, y, x2, y2))
                break
        else:
            return []  # a box found no place in 20 tries
    return [(x, y) for x, y, _, _ in placed]
