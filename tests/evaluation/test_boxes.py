import numpy as np
import pytest

from prism_deco.evaluation.metrics.boxes import iou, normalise_box, parse_lenient, parse_strict, round_box, unpad


@pytest.mark.parametrize(
    ("output", "strict", "lenient"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
        ("[0,0,1,1]", (0, 0, 1, 1), (0, 0, 1, 1)),
        (" [0.1,0.2 ,0.3, 0.4]", (0.1, 0.2, 0.3, 0.4), (0, 0, 0, 0)),  # lmms-eval allows no space before a comma
        ("[ 0.1,  0.2,\n0.3,0.4 ]", (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
        ("[0.1 , 0.2, 0.3, 0.4] [0, 0, 1, 1]", None, (0, 0, 1, 1)),
        ("The box is [0.1, 0.2, 0.3, 0.4].", None, (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.3, 0.4] [0.5, 0.5, 1, 1]", None, (0.1, 0.2, 0.3, 0.4)),
        ("(0.1, 0.2, 0.3, 0.4)", None, (0, 0, 0, 0)),
        ("[0.3, 0.2, 0.1, 0.4]", None, (0.3, 0.2, 0.1, 0.4)),  # inverted in x
        ("[0.1, 0.4, 0.3, 0.2]", None, (0.1, 0.4, 0.3, 0.2)),  # inverted in y
        ("[0.1, 0.2, 0.1, 0.4]", None, (0.1, 0.2, 0.1, 0.4)),  # no area
        ("[0.1, 0.2, 0.3, 1.01]", None, (0.1, 0.2, 0.3, 1.01)),  # beyond the image
        ("[-0.1, 0.2, 0.3, 0.4]", None, (-0.1, 0.2, 0.3, 0.4)),
        ("[10, 20, 30, 40]", None, (10, 20, 30, 40)),  # pixels
        ("[0.1, 0.2, 0.3]", None, (0, 0, 0, 0)),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None, (0, 0, 0, 0)),
        ("['a', 0, 1, 1]", None, (0, 0, 0, 0)),
        ("[[0, 0, 1, 1]]", None, (0, 0, 1, 1)),
        ("[0.1, 0.2, 0.3, 0.4", None, (0, 0, 0, 0)),
        ("", None, (0, 0, 0, 0)),
        ("none", None, (0, 0, 0, 0)),
        ("__import__('os')", None, (0, 0, 0, 0)),
        ("[" * 3000, None, (0, 0, 0, 0)),
    ],
)
def test_parsing(output, strict, lenient):
    assert parse_strict(output) == strict
    assert parse_lenient(output) == lenient


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1),
        ((0, 0, 0.5, 1), (0, 0, 1, 1), 0.5),
        ((0, 0, 0.5, 0.5), (0, 0, 1, 1), 0.25),
        ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0),  # they touch
        ((0, 0, 0.4, 0.4), (0.6, 0.6, 1, 1), 0),
        ((0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 1 / 7),
        ((0, 0, 0.75, 1), (0.25, 0, 1, 1), 0.5),
        ((0.25, 0.25, 0.75, 0.75), (0, 0, 1, 1), 0.25),
        ((0, 0, 2, 1), (0, 0, 1, 1), 0.5),  # beyond the image
        ((-1, 0, 1, 1), (0, 0, 1, 1), 0.5),
        ((1, 0, 0, 1), (0, 0, 1, 1), 0),  # inverted in x
        ((0, 1, 1, 0), (0, 0, 1, 1), 0),  # inverted in y
        ((1, 1, 0, 0), (0, 0, 1, 1), 0),  # inverted in both: the product of its sides would be positive
        ((0.5, 0, 0.5, 1), (0, 0, 1, 1), 0),  # no area
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),
        ((0, 0, 1, 0.5), (0, 0.25, 1, 0.75), 1 / 3),
    ],
)
def test_iou(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)


def test_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        boxes = []
        for _ in range(2):
            (x1, x2), (y1, y2) = np.sort(rng.choice(41, (2, 2), replace=False).reshape(2, 2), axis=1)
            boxes.append((x1, y1, x2, y2))
        masks = np.zeros((2, 40, 40), dtype=bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = True
        a, b = (tuple(float(n) / 40 for n in box) for box in boxes)
        assert iou(a, b) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        # (width, height); the side is the larger, the border (side - length) // 2
        ((0.1, 0.2, 0.3, 0.4), (64, 64), (0.1, 0.2, 0.3, 0.4)),
        ((0, 0.25, 1, 0.75), (100, 50), (0, 0, 1, 1)),
        ((0, 0, 1, 1), (100, 50), (0, -0.5, 1, 1.5)),  # reaches into the border
        ((0.25, 0, 0.75, 1), (50, 100), (0, 0, 1, 1)),
        ((0.5, 0.5, 1, 1), (50, 100), (0.5, 0.5, 1.5, 1)),
        ((0, 0.5, 0.5, 0.75), (100, 50), (0, 0.5, 0.5, 1)),
        ((0, 2 / 9, 1, 7 / 9), (9, 4), (0, 0, 1, 5 / 4)),  # 5 odd rows of border: 2 above
        ((0, 2 / 9, 1, 6 / 9), (9, 4), (0, 0, 1, 1)),
        ((1 / 4, 0, 2 / 4, 1), (1, 4), (0, 0, 1, 1)),  # 3 odd columns of border: 1 to the left
        ((0, 0, 1, 1), (1, 4), (-1, 0, 3, 1)),
        ((0, 0, 1, 1), (5, 4), (0, 0, 1, 5 / 4)),  # an odd border of 1: none above
        ((0.2, 0.4, 0.6, 0.8), (5, 4), (0.2, 0.5, 0.6, 1)),
        ((0, 0, 0, 0), (100, 50), (0, -0.5, 0, -0.5)),
        ((0.4, 0.4, 0.6, 0.6), (100, 50), (0.4, 0.3, 0.6, 0.7)),
        ((0, 80 / 640, 1, 560 / 640), (640, 480), (0, 0, 1, 1)),
    ],
)
def test_unpad(box, size, expected):
    assert unpad(box, *size) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("xywh", "size", "expected"),
    [
        ([0, 0, 10, 10], (10, 10), (0, 0, 1, 1)),
        ([10, 20, 30, 40], (100, 100), (0.1, 0.2, 0.4, 0.6)),
        ([10, 20, 30, 40], (200, 100), (0.05, 0.2, 0.2, 0.6)),
        ([1, 1, 1, 1], (3, 3), (0.33, 0.33, 0.67, 0.67)),
        ([103.93, 299.99, 134.22, 177.42], (640, 480), (0.16, 0.62, 0.37, 0.99)),
        ([0, 0, 640, 480], (640, 480), (0, 0, 1, 1)),
        ([320, 240, 160, 120], (640, 480), (0.5, 0.5, 0.75, 0.75)),
        ([100, 0, 100, 50], (400, 50), (0.25, 0, 0.5, 1)),
        ([0, 10, 7, 3], (7, 30), (0, 0.33, 1, 0.43)),
        ([2, 2, 2, 2], (6, 8), (0.33, 0.25, 0.67, 0.5)),
        ([1.5, 2.5, 3, 4], (10, 10), (0.15, 0.25, 0.45, 0.65)),
        ([99, 99, 1, 1], (100, 100), (0.99, 0.99, 1, 1)),
        ([0, 0, 1, 1], (300, 250), (0, 0, 0, 0)),  # a box of a pixel vanishes
        ([12.34, 56.78, 20, 30], (100, 200), (0.12, 0.28, 0.32, 0.43)),
        ([-2, 0, 12, 5], (10, 5), (-0.2, 0, 1, 1)),  # nothing is clipped
    ],
)
def test_boxes_are_normalised_to_two_decimals(xywh, size, expected):
    box = normalise_box(xywh, *size)
    assert round_box(box) == expected
    x, y, w, h = xywh
    assert box == pytest.approx([x / size[0], y / size[1], (x + w) / size[0], (y + h) / size[1]])
