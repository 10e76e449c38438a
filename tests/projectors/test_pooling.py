"""Pooling against a slow loop over the window formula and against torch's adaptive pooling."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prism_deco.projectors import build_projector
from prism_deco.projectors.windows import GridMaxPool, average_matrix, average_pool, window_bounds

# (patch grid, token grid): disjoint windows, overlapping and uneven ones, rectangles, one patch per token, one token.
CASES = [
    ((24, 24), (12, 12)),
    ((27, 27), (12, 12)),
    ((16, 16), (12, 12)),
    ((27, 27), (8, 8)),
    ((7, 10), (3, 3)),
    ((5, 4), (4, 4)),
    ((6, 6), (6, 6)),
    ((3, 5), (1, 1)),
]
by_case = pytest.mark.parametrize("in_grid, out_grid", CASES, ids=str)


def window(size: int, out: int, index: int) -> range:
    return range(math.floor(Fraction(index * size, out)), math.ceil(Fraction((index + 1) * size, out)))


def slow_pool(grid: torch.Tensor, out_grid: tuple[int, int], reduce) -> torch.Tensor:
    """[B, h, w, D] -> [B, i, j, D], one window at a time."""
    (_, h, w, _), (i, j) = grid.shape, out_grid
    rows = []
    for y in range(i):
        cells = []
        for x in range(j):
            patches = [grid[:, r, c] for r in window(h, i, y) for c in window(w, j, x)]
            cells.append(reduce(torch.stack(patches, dim=1)))
        rows.append(torch.stack(cells, dim=1))
    return torch.stack(rows, dim=1)


def torch_pool(kind: type[nn.Module], grid: torch.Tensor, out_grid: tuple[int, int]) -> torch.Tensor:
    return kind(out_grid)(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def value_and_gradient(pool, grid: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grid = grid.clone().requires_grad_()
    out = pool(grid)
    return out.detach(), torch.autograd.grad(out, grid, cotangent)[0]


def inputs(in_grid, out_grid) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *in_grid, 3, generator=generator), torch.randn(2, *out_grid, 3, generator=generator)


def averaged(grid: torch.Tensor, out_grid: tuple[int, int]) -> torch.Tensor:
    """float[B, h, w, D] -> float[B, i, j, D]."""
    height, width = grid.shape[1:3]
    return average_pool(grid.flatten(1, 2), (height, width), out_grid).unflatten(1, out_grid)


def test_windows_of_the_paper():
    start, end = window_bounds(27, 12)
    assert start.tolist() == [0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 22, 24]
    assert (end - start).tolist() == [3] * 12
    start, end = window_bounds(24, 12)
    assert start.tolist() == list(range(0, 24, 2)) and (end - start).tolist() == [2] * 12
    start, end = window_bounds(16, 12)
    assert start.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14] and (end - start).tolist() == [2] * 12
    start, end = window_bounds(27, 8)
    assert (end - start).tolist() == [4, 4, 5, 4, 4, 5, 4, 4]


@pytest.mark.parametrize("size", range(1, 31))
def test_windows_equal_the_formula(size):
    for out in range(1, size + 1):
        start, end = window_bounds(size, out)
        windows = [window(size, out, index) for index in range(out)]
        assert start.tolist() == [w.start for w in windows] and end.tolist() == [w.stop for w in windows]


@by_case
def test_average(in_grid, out_grid):
    grid, cotangent = inputs(in_grid, out_grid)
    ours = value_and_gradient(lambda x: averaged(x, out_grid), grid, cotangent)
    loop = value_and_gradient(lambda x: slow_pool(x, out_grid, lambda w: w.mean(dim=1)), grid, cotangent)
    library = value_and_gradient(lambda x: torch_pool(nn.AdaptiveAvgPool2d, x, out_grid), grid, cotangent)
    for other in (loop, library):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


@by_case
@pytest.mark.parametrize("tied", [False, True])
def test_maximum(in_grid, out_grid, tied):
    grid, cotangent = inputs(in_grid, out_grid)
    if tied:  # few distinct values: which of several maxima gets the gradient matters
        grid = grid.round()

    def maxima(x: torch.Tensor) -> torch.Tensor:
        return GridMaxPool(in_grid, out_grid)(x.flatten(1, 2))[0].unflatten(1, out_grid)

    ours = value_and_gradient(maxima, grid, cotangent)
    loop = value_and_gradient(lambda x: slow_pool(x, out_grid, lambda w: w.max(dim=1).values), grid, cotangent)
    library = value_and_gradient(lambda x: torch_pool(nn.AdaptiveMaxPool2d, x, out_grid), grid, cotangent)
    for other in (loop, library):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


@by_case
def test_winners(in_grid, out_grid):
    grid = inputs(in_grid, out_grid)[0].round()
    _, indices = F.adaptive_max_pool2d(grid.permute(0, 3, 1, 2), out_grid, return_indices=True)
    values, winners = GridMaxPool(in_grid, out_grid)(grid.flatten(1, 2))
    assert torch.equal(winners, indices.flatten(2).transpose(1, 2))
    assert torch.equal(grid.flatten(1, 2).gather(1, winners), values)


def test_average_of_bfloat16_is_rounded_once():
    grid = inputs((27, 27), (12, 12))[0].to(torch.bfloat16)
    exact = torch_pool(nn.AdaptiveAvgPool2d, grid.double(), (12, 12))
    with torch.autocast("cpu", torch.bfloat16):  # must not lower the precision of the sums
        pooled = averaged(grid, (12, 12))
    # bfloat16 has 8 significant bits: one rounding is off by 2^-8 of the value at most, two by more.
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.double(), exact, rtol=2**-8, atol=1e-7)


def test_average_keeps_float64():
    grid = inputs((5, 4), (3, 3))[0].double()
    torch.testing.assert_close(
        averaged(grid, (3, 3)), torch_pool(nn.AdaptiveAvgPool2d, grid, (3, 3)), rtol=0, atol=1e-15
    )


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("name, pool", [("avgpool", nn.AdaptiveAvgPool2d), ("maxpool", nn.AdaptiveMaxPool2d)])
def test_pooling_comes_before_the_mlp(name, pool):
    projector = build_projector(name, 6, 5, (7, 9), 9)
    features = torch.randn(2, 63, 6)
    pooled = pool((3, 3))(features.transpose(1, 2).reshape(2, 6, 7, 9)).flatten(2).transpose(1, 2)
    first, _, second = projector.mlp
    expected = gelu(pooled @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(projector(features), expected, rtol=1e-5, atol=1e-6)


def test_linear_is_the_mlp_of_every_patch():
    projector = build_projector("linear", 6, 5, (2, 3), 6)
    features = torch.randn(2, 6, 6)
    first, _, second = projector.mlp
    expected = gelu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(projector(features), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(projector.query_to_patch(), torch.eye(6))


@pytest.mark.parametrize("num_tokens", [4, 5, 144])
def test_linear_refuses_another_number_of_tokens(num_tokens):
    with pytest.raises(ValueError, match=f"all 6 patches of the grid 2x3.*num_tokens={num_tokens}"):
        build_projector("linear", 6, 5, (2, 3), num_tokens)


def test_mlp_widths():
    fused = build_projector("avgpool", 6, 5, (4, 4), 4, mlp_depth=3, mlp_ratio=4)
    shapes = [tuple(layer.weight.shape) for layer in fused.mlp if isinstance(layer, nn.Linear)]
    assert shapes == [(24, 6), (5, 24), (5, 5)]
    deep = build_projector("linear", 6, 5, (4, 4), mlp_depth=4)
    shapes = [tuple(layer.weight.shape) for layer in deep.mlp if isinstance(layer, nn.Linear)]
    assert shapes == [(5, 6), (5, 5), (5, 5), (5, 5)]
    with pytest.raises(ValueError, match="depth 0"):
        build_projector("linear", 6, 5, (4, 4), mlp_depth=0)
    with pytest.raises(ValueError, match="mlp_ratio=4"):
        build_projector("linear", 6, 5, (4, 4), mlp_depth=1, mlp_ratio=4)


@by_case
def test_query_to_patch_is_the_pooling(in_grid, out_grid):
    grid, _ = inputs(in_grid, out_grid)
    shares = build_projector("avgpool", 3, 2, in_grid, out_grid[0] * out_grid[1]).query_to_patch()
    pooled = torch_pool(nn.AdaptiveAvgPool2d, grid, out_grid).flatten(1, 2)
    torch.testing.assert_close(shares @ grid.flatten(1, 2), pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(shares)))


def test_query_to_patch_with_overlaps():
    shares = build_projector("avgpool", 3, 2, (27, 27), 144).query_to_patch()
    assert shares.shape == (144, 729)
    torch.testing.assert_close(shares[shares > 0], torch.full((144 * 9,), 1 / 9))
    ninths = (shares.sum(dim=0) * 9).round().long()
    assert sorted(set(ninths.tolist())) == [1, 2, 4]  # a patch lies in 1, 2 or 4 windows
    # The token in row 1, column 2 averages patch rows 2-4 and columns 4-6.
    patches = [row * 27 + column for row in (2, 3, 4) for column in (4, 5, 6)]
    assert shares[1 * 12 + 2].nonzero().flatten().tolist() == patches


def test_query_to_patch_of_max_pooling():
    assert build_projector("maxpool", 3, 2, (4, 4), 4).query_to_patch() is None
    assert torch.equal(build_projector("maxpool", 3, 2, (4, 4), 16).query_to_patch(), torch.eye(16))


def test_average_matrix_rows():
    expected = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0.5, 0.5]])
    torch.testing.assert_close(average_matrix(5, 3), expected)
