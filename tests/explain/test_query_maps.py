"""Query-to-Patch of each projector against slow loops, and planted signals that must come back."""

import math

import pytest
import torch
from einops import rearrange
from torch import nn

from prism_deco.explain.query_maps import trace
from prism_deco.explain.query_maps.gradient import InputGradient, structural_bound
from prism_deco.projectors import PROJECTORS
from prism_deco.projectors.base import Projector

T = 2
MANY = 3  # targets times 16 visual tokens are more than half of the 64 patches


@pytest.fixture
def traced(small):
    """projector -> the module, its maps on seeded features float64[1, 64, 96], random gradients float64[T, M, 128]."""

    def build(name, targets=T, **options):
        projector = small(projector=name, **options)[0].projector
        features = torch.randn(1, 64, projector.in_dim, dtype=torch.float64)
        gradients = torch.randn(targets, projector.num_tokens, projector.out_dim, dtype=torch.float64)
        projector.requires_grad_(False)
        return projector, trace(projector, projector, features), features, gradients

    return build


def test_linear_is_the_identity_and_avgpool_its_windows(traced):
    _, maps, _, gradients = traced("linear")
    assert torch.equal(maps.relevance(gradients), torch.eye(64, dtype=torch.float64))
    _, maps, _, gradients = traced("avgpool")
    for m, row in enumerate(maps.relevance(gradients).reshape(4, 4, 8, 8).flatten(0, 1)):
        i, j = divmod(m, 4)
        expected = torch.zeros(8, 8, dtype=torch.float64)
        expected[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = 1 / 4
        assert torch.equal(row, expected)
    assert torch.equal(maps.attention(), maps.relevance(gradients))


def test_maxpool_routes_each_channel_to_its_winner(traced):
    projector, maps, features, gradients = traced("maxpool")
    pooled, winners = nn.functional.adaptive_max_pool2d(
        rearrange(features, "b (h w) d -> b d h w", h=8), (4, 4), return_indices=True
    )
    pooled, winners = (rearrange(x, "1 d i j -> (i j) d") for x in (pooled, winners))
    leaf = pooled.clone().requires_grad_()
    result, share = maps.relevance(gradients), maps.attention()
    for t in range(T):
        (by_value,) = torch.autograd.grad((projector.mlp(leaf) * gradients[t]).sum(), leaf)
        for m in range(16):
            expected, counted = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
            for d in range(96):
                expected[winners[m, d]] += (by_value[m, d] * pooled[m, d]).abs()
                counted[winners[m, d]] += 1 / 96
            torch.testing.assert_close(result[t, m], expected / expected.sum())
            torch.testing.assert_close(share[m], counted)


def rule(kinds, weighed, start):
    """R^qp by the rules of the paper for one target, on plain matrices."""
    queries, patches = torch.eye(len(start), dtype=torch.float64), start.clone()
    for kind, a in zip(kinds, weighed, strict=True):
        if kind == "self":
            queries, patches = queries + a @ queries, patches + a @ patches
            continue
        added = queries - torch.eye(len(start), dtype=torch.float64)
        for m in range(len(start)):
            if added[m].sum() > 0:
                added[m] /= added[m].sum()
        patches = patches + (added + torch.eye(len(start), dtype=torch.float64)).T @ a
    return patches


def literal_weights(attention, gradient):
    return sum(torch.relu(a * g) for a, g in zip(attention, gradient, strict=True)) / len(attention)


def test_qformer_follows_the_rules(traced):
    projector, maps, features, gradients = traced("qformer")
    projector.requires_grad_(True)
    kinds, kept = zip(*projector.expose_attention(), strict=True), []
    kinds, modules = kinds
    assert kinds == ("self", "cross", "self", "self", "cross")  # layers 0 and 2 of 3 attend to patches
    for module in modules:
        module.register_forward_hook(lambda _, __, output: kept.append(output[1]))
    tokens = projector(features)[0]
    result = maps.relevance(gradients)
    for t in range(T):
        by_attention = torch.autograd.grad((tokens * gradients[t]).sum(), kept, retain_graph=True)
        weighed = [literal_weights(a[0].detach(), g[0]) for a, g in zip(kept, by_attention, strict=True)]
        expected = rule(kinds, weighed, torch.zeros(16, 64, dtype=torch.float64))
        torch.testing.assert_close(result[t], expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(maps.attention(), kept[-1][0].detach().mean(dim=0), rtol=1e-6, atol=1e-9)


def bilinear(locations, weights):
    """float[H, M, N] from float[M, H, P, 2] and float[M, H, P], one sampled point after another."""
    queries, heads, points = weights.shape
    rows = [[[torch.zeros(()).double()] * 64 for _ in range(queries)] for _ in range(heads)]
    for m in range(queries):
        for h in range(heads):
            for p in range(points):
                x, y = locations[m, h, p] * 8 - 0.5
                corner = (math.floor(y.item()), math.floor(x.item()))
                for row in (corner[0], corner[0] + 1):
                    for column in (corner[1], corner[1] + 1):
                        if 0 <= row < 8 and 0 <= column < 8:
                            near = (1 - (y - row).abs()) * (1 - (x - column).abs())
                            n = row * 8 + column
                            rows[h][m][n] = rows[h][m][n] + weights[m, h, p] * near
    return torch.stack([torch.stack([torch.stack(row) for row in head]) for head in rows])


@pytest.mark.parametrize("mode", ["query", "tgt"])
def test_d_abstractor_is_explained_by_the_dense_attention_of_the_same_effect(traced, monkeypatch, mode):
    projector, maps, features, gradients = traced("d_abstractor", query_mode=mode)
    features.requires_grad_()
    kept = []

    def dense_sample(values, locations, weights, grid):
        """The same sampling as a product with a dense matrix, which is then a node of the graph."""
        kept.append(bilinear(locations[0], weights[0])[None])
        return torch.einsum("bhmn,bnhe->bmhe", kept[-1], values)

    monkeypatch.setattr("prism_deco.projectors.attention.sample", dense_sample)
    for layer in projector.layers:
        layer.self_attention.register_forward_hook(lambda _, __, output: kept.append(output[1]))
    tokens = projector(features)[0]
    torch.testing.assert_close(tokens, maps.tokens[0], rtol=1e-9, atol=1e-9)
    start = torch.zeros(16, 64, dtype=torch.float64)
    if mode == "tgt":
        for m in range(16):
            for n in range(64):
                start[m, n] = 0.25 * (m // 4 == n // 16 and m % 4 == n % 8 // 2)
    result = maps.relevance(gradients)
    for t in range(T):
        by_attention = torch.autograd.grad((tokens * gradients[t]).sum(), kept, retain_graph=True)
        weighed = [literal_weights(a[0].detach(), g[0]) for a, g in zip(kept, by_attention, strict=True)]
        assert all(w.max() > 0 for w in weighed)
        torch.testing.assert_close(result[t], rule(["self", "cross"] * 2, weighed, start), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(maps.attention(), kept[-1][0].detach().mean(dim=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("targets", [1, MANY])
def test_c_abstractor_is_input_times_gradient_per_visual_token(traced, targets):
    """Few targets are traced backwards, many forwards."""
    projector, maps, features, gradients = traced("c_abstractor", targets)
    leaf = features.requires_grad_()
    tokens = projector(leaf)[0]
    result = maps.relevance(gradients)
    for t in range(targets):
        for m in range(16):
            (slope,) = torch.autograd.grad(tokens[m] @ gradients[t, m], leaf, retain_graph=True)
            expected = torch.relu((slope * leaf).sum(dim=-1))[0].detach()
            torch.testing.assert_close(result[t, m], expected / expected.sum(), rtol=1e-7, atol=1e-12)


def test_structural_bound_holds_what_the_convolutions_reach(traced):
    """The exact support of the derivative, squeeze-and-excitation switched off."""
    projector, _, features, _ = traced("c_abstractor")
    for name, module in projector.named_modules():
        if name.endswith(".se"):
            module.forward = lambda x: x
    features = features[:, :, :].requires_grad_()
    bound = structural_bound(projector)
    tokens = projector(features)[0]
    reached = torch.zeros(16, 64, dtype=torch.bool)
    for m in range(16):
        (slope,) = torch.autograd.grad(tokens[m].square().sum(), features, retain_graph=True)
        reached[m] = slope[0].abs().sum(dim=-1) > 0
    assert torch.equal(bound.bool(), reached)
    assert 0 < bound.mean() < 1


@pytest.mark.parametrize(
    "name",
    ["linear", "avgpool", "maxpool", "qformer", "c_abstractor", "d_abstractor", "window_attention", "token_packer"],
)
def test_a_planted_patch_comes_back(traced, name):
    """One patch carries a signal; the target is what it changed in the visual tokens."""
    projector, _, features, _ = traced(name)
    planted, blank = 27, torch.zeros_like(features)
    signal = blank.clone()
    signal[0, planted] = 6 * features[0, planted].abs()
    maps = trace(projector, projector, signal)
    with torch.no_grad():
        changed = (maps.tokens - projector(blank))[0]
    relevance = maps.relevance(changed[None])
    relevance = relevance if relevance.ndim == 2 else relevance[0]
    drawn_on = changed.square().sum(dim=1) @ relevance
    # A mean does not tell which patch of its window the signal came from.
    candidates = [18, 19, 26, 27] if name == "avgpool" else [planted]
    assert int(drawn_on.argmax()) in candidates


@pytest.mark.parametrize("name", ["window_attention", "token_packer"])
def test_attention_within_windows_is_one_cross_attention(traced, name):
    """Spread over all patches by a mask, it is the dense attention of the same effect."""
    projector, maps, features, gradients = traced(name)
    result, attention = maps.relevance(gradients), maps.attention()
    leaf, seen = features.clone().requires_grad_(), []
    handle = projector.attention.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    tokens = projector(leaf)[0]
    handle.remove()
    for t in range(T):
        (slopes,) = torch.autograd.grad((tokens * gradients[t]).sum(), seen[0], retain_graph=True)
        weighed = literal_weights(seen[0][0].detach(), slopes[0])
        for m in range(16):
            row, column = 2 * (m // 4), 2 * (m % 4)
            expected, raw = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
            expected[row : row + 2, column : column + 2] = weighed[m].reshape(2, 2)
            raw[row : row + 2, column : column + 2] = seen[0][0, :, m].detach().mean(dim=0).reshape(2, 2)
            torch.testing.assert_close(result[t, m], expected.flatten())
            torch.testing.assert_close(attention[m], raw.flatten())


def test_the_resampler_follows_the_rule_of_self_attention(traced):
    """On one sequence of 64 patches and 16 latents, of which the patches attend to themselves alone."""
    projector, maps, features, gradients = traced("resampler")
    leaf = features.clone().requires_grad_()
    projector.body.set_attn_implementation("eager")
    seen = []
    handles = [
        m.register_forward_hook(lambda _, __, output: seen.append(output[1])) for m in projector.expose_attention()
    ]
    tokens = projector(leaf)[0]
    for handle in handles:
        handle.remove()
    result = maps.relevance(gradients)
    for t in range(T):
        relevance = torch.eye(80, dtype=torch.float64)
        slopes = torch.autograd.grad((tokens * gradients[t]).sum(), seen, retain_graph=True)
        for probabilities, slope in zip(seen, slopes, strict=True):
            step = torch.zeros(80, 80, dtype=torch.float64)
            step[64:] = literal_weights(probabilities[0].detach(), slope[0])
            relevance = relevance + step @ relevance
        torch.testing.assert_close(result[t], relevance[64:, :64])
    torch.testing.assert_close(maps.attention(), seen[-1][0, :, :, :64].detach().mean(dim=0))


def test_random_patches_are_their_own_map(traced):
    projector, maps, features, gradients = traced("random_patches")
    assert torch.equal(maps.relevance(gradients) @ features[0], projector.pool_patches(features)[0])


@pytest.mark.parametrize("targets", [T, MANY])
@pytest.mark.parametrize(
    "name", ["qformer", "c_abstractor", "d_abstractor", "window_attention", "token_packer", "resampler"]
)
def test_parts_do_not_change_the_map(traced, monkeypatch, name, targets):
    _, maps, _, gradients = traced(name, targets)
    whole = maps.relevance(gradients)
    for module in ("maps", "gradient"):
        monkeypatch.setattr(f"prism_deco.explain.query_maps.{module}.FLOATS", 9_000)
    torch.testing.assert_close(maps.relevance(gradients), whole)


def test_projectors_without_forward_derivatives_are_differentiated_backwards(traced):
    """Bilinear sampling has none: the same map follows from passes backwards."""
    projector, _, features, gradients = traced("d_abstractor", MANY)
    leaf = features.clone().requires_grad_()
    tokens = projector(leaf)[0]
    result = InputGradient(projector, projector, features).relevance(gradients)
    for t in range(MANY):
        for m in range(16):
            (slope,) = torch.autograd.grad(tokens[m] @ gradients[t, m], leaf, retain_graph=True)
            expected = torch.relu((slope * leaf).sum(dim=-1))[0].detach()
            torch.testing.assert_close(result[t, m], expected / expected.sum(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["maxpool", "c_abstractor"])
def test_rows_sum_to_one(traced, name):
    _, maps, _, gradients = traced(name)
    for rows in (maps.relevance(gradients), maps.attention()):
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones_like(rows.sum(dim=-1)))


def test_a_projector_from_outside_is_served_by_gradients(small):
    class Mixer(Projector):
        """Every visual token is a fixed mixture of all patches."""

        def __init__(self):
            super().__init__(in_dim=6, out_dim=6, in_grid=(2, 3), out_grid=(2, 2))
            self.mix = nn.Parameter(torch.rand(4, 6).double())

        def project(self, features):
            return self.mix @ features

    projector = Mixer()
    features = torch.rand(1, 6, 6, dtype=torch.float64)
    maps = trace(projector, projector, features)
    assert isinstance(maps, InputGradient) and "Mixer" not in PROJECTORS.names()
    gradients = torch.rand(1, 4, 6, dtype=torch.float64)
    expected = projector.mix.detach() * (gradients[0] @ features[0].T)
    torch.testing.assert_close(maps.relevance(gradients)[0], expected / expected.sum(dim=1, keepdim=True))
    torch.testing.assert_close(maps.attention(), torch.full((4, 6), 1 / 6, dtype=torch.float64))
