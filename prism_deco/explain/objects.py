"""Images with labelled objects, for probes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from prism_deco.data.images import resolve_image
from prism_deco.errors import UsageError
from prism_deco.explain.geometry import Box
from prism_deco.files import read_json

CATEGORY, POSITION, RECONSTRUCTION = "category", "position", "reconstruction_r2"
"""What probes measure besides the attributes of objects, which therefore cannot have these names."""


@dataclass(frozen=True)
class LabelledImage:
    """An image file, and for each annotated object its box in pixels and its labels by name."""

    path: Path
    objects: tuple[tuple[Box, dict[str, str]], ...] = ()


def read_objects(path: Path, root: Path, limit: int | None = None) -> list[LabelledImage]:
    """The first `limit` images of a file in COCO's format (`instances.json`).

    An object's labels are its `category` and, as in CVAT's exports, its `attributes` {name: value} if it has any.

    Args:
        root: folder of the images.

    Raises:
        UsageError: the file is missing, damaged or in another format, it lists an image twice (which a probe could
            then be fitted to and tested on), or an image lies outside the folder.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing: name a file in the format of COCO's instances.")
    content = read_json(path, ["images", "annotations", "categories"])
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        # All images, whatever the limit: annotations of an image that is not listed are a damaged file.
        found: dict[object, list[tuple[Box, dict[str, str]]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = map(float, annotation["bbox"])
            if not all(map(math.isfinite, (x, y, width, height))) or min(width, height) < 0:
                raise ValueError(f"the bbox {annotation['bbox']} is not x, y, width, height")
            attributes = annotation.get("attributes", {})
            if taken := {CATEGORY, POSITION, RECONSTRUCTION} & set(attributes):
                raise ValueError(f"an attribute is called {min(taken)}, which probes measure themselves: rename it")
            labels = {CATEGORY: names[annotation["category_id"]]} | attributes
            box = (x, y, x + width, y + height)
            found[annotation["image_id"]].append((box, {name: str(value) for name, value in labels.items()}))
        for key in ("id", "file_name"):
            values = [image[key] for image in content["images"]]
            if len(set(values)) < len(values):
                raise ValueError(f"several images have the same {key}")
        listed = [(resolve_image(root, image["file_name"]), found[image["id"]]) for image in content["images"][:limit]]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not in the format of COCO's instances: {error!r}.") from error
    return [LabelledImage(image, tuple(objects)) for image, objects in listed]
