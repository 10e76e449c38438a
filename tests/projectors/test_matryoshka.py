"""Matryoshka: every number of visual tokens is an average pool of the same patches, and all of them are trained."""

import pytest
import torch
from torch.nn import functional as F

from prism_deco.projectors import build_projector


def test_it_halves_the_side_until_one_token_is_left():
    for num_tokens, scales in ((576, (576, 144, 36, 9, 1)), (144, (144, 36, 9, 1)), (16, (16, 4, 1)), (1, (1,))):
        with torch.device("meta"):
            assert build_projector("matryoshka", 8, 6, (24, 24), num_tokens).scales == scales


@pytest.mark.parametrize("after_mlp", [True, False])
def test_each_number_is_a_pool_of_all_patches(after_mlp):
    torch.manual_seed(0)
    projector = build_projector("matryoshka", 8, 6, (7, 5), 16, coarser=[9, 1], after_mlp=after_mlp)
    x = torch.randn(2, 35, 8)
    for scale in projector.scales:
        side = round(scale**0.5)
        patches = (projector.mlp(x) if after_mlp else x).reshape(2, 7, 5, -1).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(patches, side).flatten(2).mT
        torch.testing.assert_close(projector(x, scale), pooled if after_mlp else projector.mlp(pooled))


def test_weights_do_not_depend_on_the_number():
    trained = build_projector("matryoshka", 8, 6, (8, 8), 16, coarser=[9, 4])
    chosen = build_projector("matryoshka", 8, 6, (8, 8), 4, coarser=[9, 4])
    chosen.load_state_dict(trained.state_dict())
    x = torch.randn(2, 64, 8)
    assert chosen.scales == (4,)
    torch.testing.assert_close(chosen(x), trained(x, 4))
