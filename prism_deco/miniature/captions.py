"""A scene in words."""

from __future__ import annotations

from prism_deco.miniature.scene import IMAGE_SIZE, Box, Scene


def caption(scene: Scene) -> str:
    """Names everything in the scene, for example "a small red circle at the top left and a plate with 47"."""
    parts = [f"a {thing.size_word} {thing.category} {place(thing.box)}" for thing in scene.things]
    if scene.plate is not None:
        parts.append(f"a plate {place(scene.plate.box)} that says {scene.plate.number}")
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def place(box: Box) -> str:
    """Where the middle of a box lies in a 3x3 grid over the image, for example "at the top left"."""
    x1, y1, x2, y2 = box
    row = ("top", "", "bottom")[(y1 + y2) * 3 // (2 * IMAGE_SIZE)]
    column = ("left", "", "right")[(x1 + x2) * 3 // (2 * IMAGE_SIZE)]
    words = f"{row} {column}".strip()
    return f"at the {words}" if words else "in the middle"
