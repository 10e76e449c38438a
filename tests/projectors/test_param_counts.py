"""Parameter counts of every projector at the sizes of the paper's grid, against a table worked out elsewhere."""

import pytest
import torch

from prism_deco.build import group
from prism_deco.projectors import build_projector
from prism_deco.sweep.expand import expand
from prism_deco.sweep.spec import parse

# Patch feature width -> patch grid: CLIP ViT-L/14-336; SigLIP-384; DINOv2 + SigLIP at 384.
GRIDS = {1024: (24, 24), 1152: (27, 27), 2176: (27, 27)}
FUSED = {"mlp_depth": 3, "mlp_ratio": 4}
# (in, out): MLP of linear and DeCo, prismatic's fused MLP, Q-Former, C-Abstractor, D-Abstractor.
TABLE = {
    (1024, 1024): (2_099_200, 9_443_328, 17_832_448, 18_517_504, 17_740_256),
    (1024, 2560): (9_180_160, 21_242_880, 19_013_632, 25_598_464, 20_364_256),
    (1024, 4096): (20_979_712, 37_761_024, 20_194_816, 37_398_016, 21_938_656),
    (1152, 1024): (2_230_272, 11_082_240, 18_029_056, 20_145_824, 19_077_600),
    (1152, 2560): (9_507_840, 23_668_224, 19_210_240, 27_226_784, 21_701_600),
    (1152, 4096): (21_504_000, 40_972_800, 20_391_424, 39_026_336, 23_276_000),
    (2176, 1024): (3_278_848, 28_912_128, 19_601_920, 23_514_016, 20_126_176),
    (2176, 2560): (12_129_280, 47_789_568, 20_783_104, 30_594_976, 22_750_176),
    (2176, 4096): (25_698_304, 71_385_600, 21_964_288, 42_394_528, 24_324_576),
}
COLUMNS = (("avgpool", {}), ("avgpool", FUSED), ("qformer", {}), ("c_abstractor", {}), ("d_abstractor", {}))
CELLS = [
    pytest.param(name, dims, options, count, id=f"{name}{'-fused' * bool(options)}-{dims[0]}-{dims[1]}")
    for dims, counts in TABLE.items()
    for (name, options), count in zip(COLUMNS, counts, strict=True)
]


def count(name: str, in_dim: int, out_dim: int, in_grid: tuple[int, int], num_tokens: int | None, **options) -> int:
    with torch.device("meta"):
        projector = build_projector(name, in_dim, out_dim, in_grid, num_tokens, **options)
    return sum(parameter.numel() for parameter in projector.parameters())


@pytest.mark.parametrize("name, dims, options, expected", CELLS)
def test_table(name, dims, options, expected):
    assert count(name, *dims, GRIDS[dims[0]], 144, **options) == expected


@pytest.mark.parametrize("dims", TABLE, ids=str)
def test_linear_and_max_pooling_have_the_mlp_of_average_pooling(dims):
    grid = GRIDS[dims[0]]
    assert count("linear", *dims, grid, None) == count("maxpool", *dims, grid, 144) == TABLE[dims][0]
    assert count("linear", *dims, grid, None, **FUSED) == count("maxpool", *dims, grid, 144, **FUSED) == TABLE[dims][1]


def test_the_q_former_of_the_authors_code():
    """Linear, two layers of the LLM's width with one cross-attention to 1408 channels, linear: at 1024 -> 4096."""
    width, patches = 4096, 1408
    square = width * width + width
    norm = 2 * width
    attention = 4 * square + norm
    cross_attention = 2 * square + 2 * (patches * width + width) + norm
    feed_forward = (width * 4 * width + 4 * width) + (4 * width * width + width) + norm
    outside = 144 * width + norm + (1024 * patches + patches) + square
    expected = outside + 2 * (attention + feed_forward) + cross_attention
    [cell] = expand(parse(["projectors", "projector=qformer", "projector.heads=64"]))
    options = group(cell.config, "projector")
    assert options.pop("weights") is None and options.pop("num_tokens") == 144
    assert count(options.pop("name"), 1024, width, (24, 24), 144, **options) == expected == 466_695_552


def test_other_settings():
    assert count("c_abstractor", 1152, 2560, (16, 16), 144) == 26_681_888
    assert count("d_abstractor", 1024, 4096, (24, 24), 144, depth=6) == 55_944_032
    assert count("qformer", 1024, 4096, (24, 24), 144, readout_depth=2) == 36_976_128
    without_positions = count("c_abstractor", 1024, 4096, (24, 24), 144, position_embedding=False)
    assert without_positions == 37_398_016 - 576 * 1024
    # The layer norm on the patches comes with BLIP-2 weights: a scale and a shift per channel.
    assert count("qformer", 1024, 4096, (24, 24), 144, weights="blip2.pth") == 20_194_816 + 2 * 1024
