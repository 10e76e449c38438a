"""Images with labelled objects, for probes: JSON Lines, or COCO's instances (RefCOCO's, too)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from prism_deco.data.images import resolve_image
from prism_deco.errors import UsageError
from prism_deco.explain.geometry import Box
from prism_deco.files import read_json, refusals_named

_FORM = '{"image": "cat.jpg", "objects": [{"box": [x1, y1, x2, y2], "color": "red"}]}'


@dataclass(frozen=True)
class LabelledImage:
    """An image file, and of each object known to be in it the box in pixels and the labels by their names."""

    path: Path
    objects: tuple[tuple[Box, dict[str, str]], ...] = ()


def read_objects(path: Path, root: Path, limit: int | None = None) -> list[LabelledImage]:
    """The first images of a file, in its order.

    Args:
        path: `.json` is COCO's format (`instances.json`), whose label is the category; anything else is JSON Lines, one
            image per line, where every key of an object but `box` is a label.
        root: folder of the images.

    Raises:
        UsageError: the file is missing or damaged, a record has another form, or an image lies outside the folder.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing: name images with objects, COCO's instances.json or lines of {_FORM}")
    images = []
    for where, record in islice(_coco(path) if path.suffix == ".json" else _lines(path), limit):
        try:
            objects = tuple(_object(**thing) for thing in record.get("objects", []))
            images.append(LabelledImage(resolve_image(root, record["image"]), objects))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path}, {where}: {error}. It is to be of the form {_FORM}") from error
    return images


def _object(box: Any, **labels: Any) -> tuple[Box, dict[str, str]]:
    x1, y1, x2, y2 = map(float, box)
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"the box {box} is not [x1, y1, x2, y2]")
    return (x1, y1, x2, y2), {name: str(value) for name, value in labels.items() if value is not None}


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with refusals_named(path, "Name a file that can be read."):
        text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number} is not JSON ({error}). A line is of the form {_FORM}") from error


def _coco(path: Path) -> Iterator[tuple[str, Any]]:
    content = read_json(path, ["images", "annotations", "categories"])
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            thing = {"box": [x, y, x + width, y + height], "category": names[annotation["category_id"]]}
            by_image[annotation["image_id"]].append(thing)
        for image in content["images"]:
            yield f"image {image['id']}", {"image": image["file_name"], "objects": by_image[image["id"]]}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not COCO's instances.json: {error!r}.") from error
