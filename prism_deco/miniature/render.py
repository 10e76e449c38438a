"""Renders scenes in integer arithmetic: the same bytes on every machine."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

from prism_deco.miniature.scene import IMAGE_SIZE, PALETTE, PLATE_SIZE, Plate, Scene

_SCALE = 2
"""Pixels per dot of the plate's font."""
_DIGITS: tuple[tuple[int, ...], ...] = (
    (0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110),
    (0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110),
    (0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111),
    (0b11110, 0b00001, 0b00001, 0b01110, 0b00001, 0b00001, 0b11110),
    (0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010),
    (0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110),
    (0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110),
    (0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000),
    (0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110),
    (0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100),
)
"""A font of five by seven dots: one integer per row, whose bits are the dots from left to right."""
_DIGIT_WIDTH = 5
_DIGIT_HEIGHT = 7
_NOISE_CELL = 4
"""Side of a patch of constant noise in pixels; noise per pixel would only make larger files."""


def render(scene: Scene) -> NDArray[np.uint8]:
    """The image of a scene: uint8[64, 64, 3]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = _background(scene)[:, :, None]
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        levels = zip(PALETTE[thing.color], thing.tint, strict=True)
        # A slice is a view: the mask assigns to the image. Levels cannot become negative, since tints start at -10 and
        # the palette at 40.
        image[y1:y2, x1:x2][mask(thing.shape, thing.size)] = [min(255, level + tint) for level, tint in levels]
    if scene.plate is not None:
        x1, y1, x2, y2 = scene.plate.box
        image[y1:y2, x1:x2] = _plate(scene.plate)[:, :, None]
    return image


@functools.cache
def mask(shape: str, size: int) -> NDArray[np.bool_]:
    """The pixels of a shape in its box: bool[size, size]. It touches all four sides."""
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    # Twice the distance from the centre, which is an integer for even sizes, too.
    down, right = np.abs(2 * row - (size - 1)), np.abs(2 * column - (size - 1))
    # The triangle points up; the bars of the cross are about a third of its side.
    inside = {
        "circle": down**2 + right**2 <= size**2,
        "square": (down <= size) & (right <= size),
        "triangle": right <= row + 1,
        "cross": (3 * down <= size) | (3 * right <= size),
    }
    return inside[shape]


def _background(scene: Scene) -> NDArray[np.uint8]:
    """uint8[64, 64]: the grey level plus noise of at most 12 levels."""
    cells = IMAGE_SIZE // _NOISE_CELL
    # SHAKE (an extendable hash) gives the same noise in every version of every library.
    noise = np.frombuffer(hashlib.shake_128(scene.noise.encode()).digest(cells * cells), np.uint8) % 25
    levels = (scene.background - 12 + noise.astype(np.int16)).astype(np.uint8).reshape(cells, cells)
    return levels.repeat(_NOISE_CELL, axis=0).repeat(_NOISE_CELL, axis=1)


def _plate(plate: Plate) -> NDArray[np.uint8]:
    """uint8[20, 28]: white with a dark frame and dark digits."""
    width, height = PLATE_SIZE
    levels = np.full((height, width), 240, np.uint8)
    levels[[0, -1], :] = 30
    levels[:, [0, -1]] = 30
    # Two digits with a gap of one dot, centred.
    span = _DIGIT_WIDTH * _SCALE
    top = (height - _DIGIT_HEIGHT * _SCALE) // 2
    left = (width - 2 * span - _SCALE) // 2
    for x, value in ((left, plate.number // 10), (left + span + _SCALE, plate.number % 10)):
        digit = _digit(value)
        levels[top : top + digit.shape[0], x : x + span][digit] = 20
    return levels


@functools.cache
def _digit(value: int) -> NDArray[np.bool_]:
    """bool[14, 10]: a digit of the font, enlarged."""
    rows = np.array(_DIGITS[value])[:, None]
    dots = (rows >> np.arange(_DIGIT_WIDTH)[::-1] & 1).astype(bool)  # bool[7, 5]
    return dots.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
