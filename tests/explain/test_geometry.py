"""Maps on the original image: letterbox and crop undone, against the very pixels that the towers see."""

import numpy as np
import pytest
import torch
from PIL import Image

from prism_deco.backbones.transforms import STRATEGIES, letterbox, resize_crop
from prism_deco.explain.geometry import PatchFrame
from prism_deco.explain.render import mosaic, overlay

GRID, PATCH = (6, 6), 8  # an input of 50 px: the last two are not read


def patch_frame(size, resize):
    return PatchFrame(STRATEGIES[resize](size, 50), GRID, PATCH)


@pytest.mark.parametrize("resize", STRATEGIES)
@pytest.mark.parametrize("size", [(301, 180), (120, 240), (96, 96)])
def test_a_bright_patch_of_the_map_lies_on_the_pixels_that_the_patch_was_made_of(size, resize):
    """Painting the image where a one-patch map is bright makes that patch, and no far one, bright."""
    patches = patch_frame(size, resize)
    white = np.asarray(patches.frame.apply(Image.new("RGB", size, "white"), (0, 0, 0)).convert("L"))
    for k in (7, 15, 22, 28):
        heat = patches.upsample(torch.eye(36)[k], size)
        assert heat.shape == (size[1], size[0])
        image = Image.fromarray(((heat > 0.5).numpy() * 255).astype(np.uint8)).convert("RGB")
        seen = np.asarray(patches.frame.apply(image, (0, 0, 0)).convert("L"), dtype=float)[:48, :48]
        per_patch = seen.reshape(6, 8, 6, 8).mean(axis=(1, 3)).flatten()
        if heat.max() < 0.9:  # a patch of padding: nothing of the image belongs to it
            assert per_patch.max() < 64
            continue
        assert per_patch.argmax() == k
        # Its middle is bright wherever there is image: where bilinear values pass 0.5, the patch ends.
        row, column = divmod(k, 6)
        middle = (slice(row * 8 + 2, row * 8 + 6), slice(column * 8 + 2, column * 8 + 6))
        assert seen[middle][white[middle] == 255].min() > 200


def test_upsampling_is_bilinear_between_centres():
    patches = PatchFrame(letterbox((200, 100), 64), (8, 8), 8)
    values = torch.rand(64, generator=torch.Generator().manual_seed(0))
    heat, grid = patches.upsample(values, (200, 100)), values.reshape(8, 8)
    for column, row in ((3, 5), (100, 50), (199, 99), (57, 13)):
        # The image lies at y = 50 on a canvas of 200 x 200, which is scaled by 64/200.
        x, y = (column + 0.5) * 64 / 200 / 8 - 0.5, (row + 0.5 + 50) * 64 / 200 / 8 - 0.5
        x, y = min(max(x, 0), 7), min(max(y, 0), 7)
        left, top = min(int(x), 6), min(int(y), 6)
        upper = grid[top, left] * (left + 1 - x) + grid[top, left + 1] * (x - left)
        lower = grid[top + 1, left] * (left + 1 - x) + grid[top + 1, left + 1] * (x - left)
        torch.testing.assert_close(heat[row, column], upper * (top + 1 - y) + lower * (y - top), rtol=1e-4, atol=1e-5)


def test_cropped_parts_of_the_image_get_nothing():
    heat = PatchFrame(resize_crop((200, 100), 64), (8, 8), 8).upsample(torch.ones(64), (200, 100))
    assert heat[:, :49].max() == 0 and heat[:, 151:].max() == 0 and heat[:, 51:149].min() > 0.999


def test_rect_is_where_a_page_must_draw_the_grid():
    assert PatchFrame(letterbox((200, 100), 64), (8, 8), 8).rect == pytest.approx((0, -0.5, 1, 1.5))
    assert PatchFrame(resize_crop((200, 100), 64), (8, 8), 8).rect == pytest.approx((0.25, 0, 0.75, 1))
    # 50 px hold six patches of 8: the last 2 px are not read.
    assert patch_frame((100, 100), "letterbox").rect == pytest.approx((0, 0, 0.96, 0.96))


@pytest.mark.parametrize("resize", STRATEGIES)
def test_coverage_counts_the_pixels_of_a_box(resize):
    patches, box = patch_frame((300, 180), resize), (60.0, 33.0, 171.0, 120.0)
    x1, y1 = patches.frame.to_model(*box[:2])
    x2, y2 = patches.frame.to_model(*box[2:])
    fine = (np.arange(48 * 20) + 0.5) / 20
    inside = ((fine > y1) & (fine < y2))[:, None] & ((fine > x1) & (fine < x2))
    counted = inside.reshape(6, 160, 6, 160).mean(axis=(1, 3)).flatten()
    np.testing.assert_allclose(patches.coverage(box).numpy(), counted, atol=0.01)
    assert 0 < counted.sum() < 36


def test_overlays_keep_the_aspect_ratio_and_mark_the_maximum():
    image = Image.new("RGB", (300, 180), (90, 90, 90))
    patches = patch_frame(image.size, "letterbox")
    made = overlay(image, torch.eye(36)[15], patches, max_side=600)
    assert made.size == (600, 360)
    bright = np.asarray(made, dtype=int).sum(axis=2)
    y, x = np.unravel_index(bright.argmax(), bright.shape)
    row, column = ((np.array([y, x]) / 2 + [60, 0]) * 50 / 300 / 8).astype(int)
    assert (row, column) == (2, 3)


def test_mosaic_shows_at_most_eight_by_eight_visual_tokens():
    image = Image.new("RGB", (30, 20))
    patches = PatchFrame(letterbox(image.size, 64), (8, 8), 8)
    few = mosaic(image, torch.rand(16, 64), (4, 4), patches, side=30)
    assert few.size == (4 * 34 - 4, 4 * 24 - 4)
    many = mosaic(image, torch.rand(144, 64), (12, 12), patches, side=30)
    assert many.size == (8 * 34 - 4, 8 * 24 - 4)
