"""The images of the miniature world: boxes against pixels, digits against a picture, the same bytes everywhere."""

import hashlib
import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from prism_deco.miniature.conversations import caption
from prism_deco.miniature.render import mask, render
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import (
    IMAGE_SIZE,
    LARGE_SIZES,
    PALETTE,
    SHAPES,
    SMALL_SIZES,
    STEP,
    Plate,
    Scene,
    draw_scene,
)

SCENES = [draw_scene(3, "train", index) for index in range(300)]


def tight_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(pixels)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("index", range(10))
def test_a_box_is_the_tight_box_of_the_pixels(index):
    scene = SCENES[index]
    image = render(scene)
    for thing in scene.things:
        without = render(replace(scene, things=tuple(other for other in scene.things if other is not thing)))
        assert tight_box((image != without).any(axis=2)) == thing.box
    if scene.plate is not None:
        assert tight_box((image != render(replace(scene, plate=None))).any(axis=2)) == scene.plate.box


@pytest.mark.parametrize("size", SMALL_SIZES + LARGE_SIZES)
def test_shapes_fill_their_box_and_differ(size):
    areas = {shape: int(mask(shape, size).sum()) for shape in SHAPES}
    for shape in SHAPES:
        assert tight_box(mask(shape, size)) == (0, 0, size, size)
    assert areas["square"] == size**2
    assert areas["circle"] == pytest.approx(np.pi / 4 * size**2, rel=0.08)
    assert areas["triangle"] == size**2 / 2 + size
    assert areas["cross"] == pytest.approx(5 / 9 * size**2, rel=0.12)


def test_digits_look_like_digits():
    image = render(Scene((), Plate(27, 20, 30), 100, "any"))
    dark = (image[:, :, 0] == 20)[33:47:2, 23:45:2]
    picture = ["".join("#" if dot else "." for dot in row) for row in dark]
    assert picture == [
        ".###..#####",
        "#...#.....#",
        "....#....#.",
        "..##....#..",
        ".#.....#...",
        "#......#...",
        "#####..#...",
    ]


def test_scenes_are_as_promised():
    for scene in SCENES:
        boxes = [thing.box for thing in scene.things] + ([scene.plate.box] if scene.plate else [])
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= IMAGE_SIZE and 0 <= y1 < y2 <= IMAGE_SIZE
            assert not any(edge % STEP for edge in (x1, y1, x2, y2))
        for a, b in combinations(boxes, 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
        assert scene.plate is None or 10 <= scene.plate.number <= 99
    assert {len(scene.things) for scene in SCENES} == {1, 2, 3}
    assert 0.5 < sum(scene.plate is not None for scene in SCENES) / len(SCENES) < 0.7


def test_the_nearest_colour_of_the_palette_is_the_right_one():
    names = list(PALETTE)
    palette = np.array(list(PALETTE.values()))
    for scene in SCENES[:100]:
        image = render(scene).astype(int)
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            # The middle of the base row or column belongs to every shape.
            pixel = image[y2 - 2, (x1 + x2) // 2] if thing.shape != "circle" else image[(y1 + y2) // 2, x1 + 2]
            assert names[np.abs(palette - pixel).sum(axis=1).argmin()] == thing.color


def test_dice_follow_the_documented_generator():
    stream = random.Random("0/a")
    assert [int(stream.random() * 10) for _ in range(6)] == [9, 3, 0, 8, 4, 8]
    dice = Dice(0, "a")
    assert [dice.below(10) for _ in range(6)] == [9, 3, 0, 8, 4, 8]
    items = list(range(50))
    dice.shuffle(items)
    assert sorted(items) == list(range(50)) != items


def test_pixels_are_the_same_on_every_machine():
    digest = hashlib.sha256(b"".join(render(scene).tobytes() for scene in SCENES)).hexdigest()
    assert digest == "676c53797ac0ec3e2456ccf2ca4b6d7ce424342c2ae8da53ee59c18bb673f461"


def test_captions_name_everything():
    for index in range(50):
        scene = draw_scene(3, "captions", index)
        text = caption(scene)
        assert [f"{t.size_word} {t.category}" in text for t in scene.things] == [True] * len(scene.things)
        assert (scene.plate is not None and str(scene.plate.number) in text) or "plate" not in text
