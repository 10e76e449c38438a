"""The four ways to a square, pinned against torchvision, transformers and hand-computed numbers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F
from transformers import CLIPImageProcessorPil

from prism_deco.backbones import build_backbone
from prism_deco.backbones.transforms import STRATEGIES, TowerTransform

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(61, 40), (40, 61), (50, 50), (97, 20), (33, 34)]


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def by_torchvision(image: Image.Image, side: int, resize: str, fill: tuple[int, int, int]) -> torch.Tensor:
    """Prismatic's pipelines, written out with torchvision's own operations."""
    width, height = image.size
    longest = max(image.size)
    if resize == "letterbox":
        horizontal, vertical = int((longest - width) / 2), int((longest - height) / 2)
        image = F.pad(image, [horizontal, vertical, horizontal, vertical], fill=fill)
    target = [side, side] if resize == "resize-naive" else [side]
    image = F.resize(image, target, interpolation=F.InterpolationMode.BICUBIC)
    image = F.center_crop(image, [side, side])
    return F.normalize(F.to_tensor(image), CLIP_MEAN, CLIP_STD)


def by_transformers(image: Image.Image, side: int, resize: str, fill: tuple[int, int, int]) -> torch.Tensor:
    """LLaVA-1.5's pipelines: the CLIP processor behind `expand2square` (pad), and alone (resize-crop)."""
    if resize == "pad" and image.width != image.height:
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), fill)
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = square
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return processor(image, return_tensors="pt")["pixel_values"][0]


REAL_SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 333), (333, 500), (1024, 683), (768, 1024),
              (337, 336), (335, 500), (612, 612), (1600, 501)]  # fmt: skip


@pytest.mark.parametrize("resize", ["pad", "resize-crop"])
@pytest.mark.parametrize(
    ("side", "sizes"), [(14, list(product(range(1, 65), repeat=2))), (336, REAL_SIZES)], ids=["small", "real"]
)
def test_every_bit_is_that_of_llavas_processor(resize, side, sizes):
    transform = TowerTransform(side, resize, CLIP_MEAN, CLIP_STD)
    for size in sizes:
        image = picture(size)
        assert torch.equal(transform(image), by_transformers(image, side, resize, transform.fill)), size


@pytest.mark.parametrize("resize", ["letterbox", "resize-naive"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [32, 31])
def test_pixels_equal_prismatics_pipelines(resize, size, side):
    transform = TowerTransform(side, resize, CLIP_MEAN, CLIP_STD)
    assert transform.fill == (122, 116, 104)
    expected = by_torchvision(picture(size), side, resize, transform.fill)
    torch.testing.assert_close(transform(picture(size)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("resize", "canvas"), [("letterbox", (7, 6)), ("pad", (7, 7))])
def test_odd_difference_by_hand(resize, canvas):
    """7x4 px: (7 - 4) / 2 = 1.5 is cut to 1 on both sides; only LLaVA's padding fills the seventh row."""
    geometry = STRATEGIES[resize]((7, 4), 14)
    assert geometry.canvas == canvas
    assert geometry.paste == (0, 1)


@pytest.mark.parametrize("resize", STRATEGIES)
@pytest.mark.parametrize("size", SIZES)
def test_coordinates_follow_the_pixels(resize, size):
    """A lone bright block is found where `to_model` says, and `to_image` leads back to it."""
    x1, y1, x2, y2 = size[0] // 2 - 6, size[1] // 2 - 6, size[0] // 2 + 2, size[1] // 2 + 2
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    geometry = STRATEGIES[resize](size, 64)
    seen = np.asarray(geometry.apply(Image.fromarray(image), (0, 0, 0)))[:, :, 0].astype(float)
    rows, columns = np.arange(64) + 0.5, np.arange(64) + 0.5
    centre = (seen.sum(0) @ columns / seen.sum(), seen.sum(1) @ rows / seen.sum())
    expected = geometry.to_model((x1 + x2) / 2, (y1 + y2) / 2)
    assert np.allclose(centre, expected, atol=0.3)
    assert np.allclose(geometry.to_image(*expected), ((x1 + x2) / 2, (y1 + y2) / 2))


def test_any_image_mode_becomes_rgb():
    grey = Image.new("L", (5, 5), 51)
    values = TowerTransform(4, "letterbox", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(grey)
    assert values.shape == (3, 4, 4)
    torch.testing.assert_close(values, torch.full((3, 4, 4), 2 * 51 / 255 - 1))


def test_unknown_strategy_lists_the_choices():
    with pytest.raises(ValueError, match="letterbox, pad, resize-crop, resize-naive"):
        TowerTransform(4, "stretch", CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    ("choice", "side", "fill", "white"),
    [
        ("clip_vit_l_336", 336, (122, 116, 104), [1.9303, 2.0749, 2.1459]),
        ("siglip_so400m_224", 224, (127, 127, 127), [1.0, 1.0, 1.0]),
        ("siglip_so400m_384", 384, (127, 127, 127), [1.0, 1.0, 1.0]),
        ("dinov2_l_384", 384, (123, 116, 103), [2.2489, 2.4286, 2.6400]),
    ],
)
def test_each_tower_has_its_own_normalisation(choice, side, fill, white):
    """`white`: (1 - mean) / std by hand. A white square fills the whole input: nothing is cropped off."""
    backbone = build_backbone(choice, pretrained=False, device="meta")
    transform = backbone.transform.towers[choice]
    values = backbone.transform(Image.new("RGB", (90, 90), (255, 255, 255)))[choice]
    assert transform.fill == fill
    assert values.shape == (3, side, side)
    torch.testing.assert_close(values, torch.tensor(white)[:, None, None].expand(3, side, side), rtol=0, atol=1e-4)


def test_siglip_keeps_the_margin_that_timm_would_crop():
    """timm's crop_pct of 0.9 would cut 5 % off each side; the marked border must survive."""
    image = np.zeros((100, 100, 3), np.uint8)
    image[:2] = 255
    values = build_backbone("siglip_so400m_224", pretrained=False, device="meta").transform(Image.fromarray(image))
    assert values["siglip_so400m_224"][:, 0].min() > 0.9
