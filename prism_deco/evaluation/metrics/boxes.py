"""Bounding boxes in text: parsing, undoing padding, intersection over union (RefCOCO, RefCOCO+, RefCOCOg).

A box is (x1, y1, x2, y2) in fractions of the image's width and height, with the origin at the top left.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

Box = Sequence[float]

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BRACKETED = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")  # no space before a comma


def normalise_box(xywh: Sequence[float], width: int, height: int) -> Box:
    """A COCO box (x, y, width, height in pixels) in fractions of the image, as lmms-eval compares it."""
    x, y, w, h = xywh
    return (x / width, y / height, (x + w) / width, (y + h) / height)


def round_box(box: Box) -> Box:
    """A box rounded to two decimals, as the PRISM harness compares it."""
    return tuple(round(corner, 2) for corner in box)


def parse_strict(output: str) -> Box | None:
    """PRISM harness: the whole output must be a list of four numbers in 0..1 with x1 < x2 and y1 < y2."""
    try:
        value = ast.literal_eval(output)
        if not (isinstance(value, list) and len(value) == 4 and all(0 <= number <= 1 for number in value)):
            return None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    box = tuple(map(float, value))
    return box if box[0] < box[2] and box[1] < box[3] else None


def parse_lenient(output: str) -> Box:
    """lmms-eval: the first four bracketed numbers of any value; an empty box if there are none."""
    match = _BRACKETED.search(output)
    return tuple(map(float, match.groups())) if match else (0.0, 0.0, 0.0, 0.0)


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 if a box is inverted or has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def unpad(box: Box, width: int, height: int) -> Box:
    """Converts a box from the coordinates of the image padded to a square (LLaVA's `pad`) to those of the image.

    The image of `width` x `height` pixels is centred in the square; half pixels are rounded down.
    """
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = box
    return (
        (x1 * side - left) / width,
        (y1 * side - top) / height,
        (x2 * side - left) / width,
        (y2 * side - top) / height,
    )
