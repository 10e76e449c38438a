"""Boxes in text: parsing, the padded frame, intersection over union (RefCOCO, RefCOCO+, RefCOCOg).

A box is (x1, y1, x2, y2) in fractions of the image's width and height, origin top left.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BRACKETED = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")  # no space before a comma


def normalise_box(xywh: Sequence[float], width: int, height: int) -> Box:
    """A COCO box (x, y, width, height in pixels) in fractions of the image, as lmms-eval compares it."""
    x, y, w, h = xywh
    return (x / width, y / height, (x + w) / width, (y + h) / height)


def round_box(box: Box) -> Box:
    """A box with two decimals, as the PRISM harness compares it."""
    x1, y1, x2, y2 = box
    return (round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2))


def parse_strict(output: str) -> Box | None:
    """The PRISM harness: the whole output is a list of four numbers in 0..1 with x1 < x2 and y1 < y2."""
    try:
        value = ast.literal_eval(output)
        if not (isinstance(value, list) and len(value) == 4 and all(0 <= number <= 1 for number in value)):
            return None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    x1, y1, x2, y2 = map(float, value)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def parse_lenient(output: str) -> Box:
    """lmms-eval: the first four bracketed numbers, whatever they are; an empty box where there are none."""
    match = _BRACKETED.search(output)
    if match is None:
        return (0.0, 0.0, 0.0, 0.0)
    x1, y1, x2, y2 = map(float, match.groups())
    return (x1, y1, x2, y2)


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 for boxes that are inverted or have no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def unpad(box: Box, width: int, height: int) -> Box:
    """From the frame of the image padded to a square (LLaVA's `pad`, letterbox) to that of the image.

    The image of `width` x `height` pixels stands centred in the square, at whole pixels (rounded down).
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
