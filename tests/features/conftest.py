"""A folder of small images, and caches of their features."""

import numpy as np
import pytest
import torch
from PIL import Image

from prism_deco.backbones import build_backbone
from prism_deco.data.images import ImageFolder
from prism_deco.features import FeatureCache, Key, key
from prism_deco.features.key import names_hash
from prism_deco.projectors import build_projector

COUNT = 70
"""Images: two whole shards of 32 and a part of one."""


@pytest.fixture
def pictures(tmp_path):
    """Images of noise of several sizes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(COUNT):
        pixels = rng.integers(0, 255, (20 + i % 7, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def backbone():
    torch.manual_seed(0)
    return build_backbone("mini_siglip", pretrained=False)


@pytest.fixture
def make(tmp_path, pictures, backbone, monkeypatch):
    """(projector's name, way to compute) -> (FeatureCache of the pictures, its projector)."""
    monkeypatch.setattr(key, "_MOST_ROWS", 32)

    def cache(name="avgpool", compute="float32"):
        tokens = None if name == "linear" else 16
        projector = build_projector(name, backbone.embed_dim, 32, backbone.grid, tokens)
        names = sorted(path.name for path in pictures.iterdir())
        named = Key(
            {"name": "m"}, backbone.sha256(), backbone.transform, "data", names_hash(names), None, compute,
            projector.pooling, projector.compressed_grid,
        )  # fmt: skip
        return FeatureCache(tmp_path / "features", named, names, ImageFolder(pictures), backbone.embed_dim), projector

    return cache


@pytest.fixture
def complete(backbone):
    """(cache, projector) -> the shards that were missing or damaged, and are built now."""

    def build(cache, projector, **options):
        damaged = cache.find_damaged()
        cache.build(damaged, backbone, projector.compress, device=torch.device("cpu"), **options)
        assert cache.find_damaged() == [] and cache.missing == 0
        return damaged

    return build
