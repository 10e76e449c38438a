"""JPEGs decoded at a reduced size, against their decoding in full."""

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from prism_deco.backbones.transforms import TowerTransform
from prism_deco.data.images import ImageFolder, decode_image, load_image

SIDE = 112


def _jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return data.getvalue()


@pytest.mark.parametrize(("name", "size"), [("astronaut", (256, 256)), ("coffee", (600, 400)), ("retina", (353, 353))])
def test_pixels_differ_by_less_than_a_level_of_255(name, size):
    data = _jpeg(Image.fromarray(getattr(skimage.data, name)()))
    full, reduced = decode_image(data, name), decode_image(data, name, least_side=2 * SIDE)
    # The smallest of 1/2, 1/4 and 1/8 at which both sides keep 224 pixels; 600x400 has none.
    assert reduced.size == size
    transform = TowerTransform(SIDE, "letterbox", (0.5, 0.5, 0.5), (1 / 255,) * 3)
    difference = (transform(full) - transform(reduced)).abs().numpy()
    assert difference.mean() < 1
    assert np.percentile(difference, 99) < 12
    assert (difference.max() == 0) == (reduced.size == full.size)


def test_a_source_says_how_its_images_are_decoded(tmp_path):
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "a.jpg")
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "a.png")
    source = ImageFolder(tmp_path)
    assert load_image(source, "a.jpg").size == (512, 512)
    source.least_side = 200
    assert load_image(source, "a.jpg").size == (256, 256)
    assert load_image(source, "a.png").size == (512, 512)
