"""Images with labelled objects, for probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prism_deco.data.images import resolve_image
from prism_deco.errors import UsageError
from prism_deco.explain.geometry import Box
from prism_deco.files import read_json


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
        UsageError: the file is missing, damaged or in another format, or an image lies outside the folder.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing: name a file in the format of COCO's instances.")
    content = read_json(path, ["images", "annotations", "categories"])
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        found: dict[object, list[tuple[Box, dict[str, str]]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = map(float, annotation["bbox"])
            labels = {"category": names[annotation["category_id"]]} | annotation.get("attributes", {})
            box = (x, y, x + width, y + height)
            found[annotation["image_id"]].append((box, {name: str(value) for name, value in labels.items()}))
        listed = [(resolve_image(root, image["file_name"]), found[image["id"]]) for image in content["images"][:limit]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not in the format of COCO's instances: {error!r}.") from error
    return [LabelledImage(image, tuple(objects)) for image, objects in listed]
