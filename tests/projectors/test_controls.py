"""The controls, against what they say they are."""

import pytest
import torch
from torch.nn import functional as F

from prism_deco.backbones import build_backbone
from prism_deco.projectors import build_projector


def features(count: int = 6, grid: tuple[int, int] = (6, 8)) -> torch.Tensor:
    return torch.randn(count, grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("grid, side", [((24, 24), 12), ((27, 27), 8), ((6, 8), 3), ((5, 4), 4), ((3, 5), 1)])
def test_bilinear_is_torch_s(grid, side):
    projector = build_projector("bilinear", 12, 5, grid, side**2)
    x = features(2, grid).reshape(2, *grid, 12).permute(0, 3, 1, 2)
    resized = F.interpolate(x, size=(side, side), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(projector.pool_patches(features(2, grid)), resized)


def test_every_second_patch():
    projector = build_projector("every_kth", 12, 5, (6, 8), 4)
    kept = features().reshape(6, 6, 8, 12)[:, [1, 4]][:, :, [2, 6]].flatten(1, 2)
    assert torch.equal(projector.pool_patches(features()), kept)
    assert (projector.query_to_patch() @ torch.arange(48.0)).tolist() == [10, 14, 34, 38]


def test_random_patches_are_an_image_s_own_and_the_same_every_time():
    projector = build_projector("random_patches", 12, 5, (6, 8), 16)
    x = features(64)
    chosen = projector.chosen(x)
    assert (chosen.diff(dim=1) > 0).all() and chosen.min() >= 0 and chosen.max() < 48
    assert torch.equal(projector.pool_patches(x)[3, 5], x[3, chosen[3, 5]])
    assert torch.equal(projector.chosen(x[7:9]), chosen[7:9]) and torch.equal(projector.chosen(x.bfloat16()), chosen)
    assert len({tuple(row) for row in chosen.tolist()}) == 64


def test_random_patches_are_chosen_alike():
    """A patch is chosen with probability 1/3; four standard deviations of 2000 draws are 0.042."""
    projector = build_projector("random_patches", 12, 5, (6, 8), 16)
    often = F.one_hot(projector.chosen(features(2000)), 48).sum(dim=1).double().mean(dim=0)
    assert (often - 1 / 3).abs().max() < 0.042


def test_a_smaller_image_gives_as_many_tokens_by_itself():
    tower = build_backbone("clip_vit_l_336", pretrained=False, device="meta", image_size=168)
    with torch.device("meta"):
        assert build_projector("linear", tower.embed_dim, 8, tower.grid).num_tokens == 144
