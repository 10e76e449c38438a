"""Deformable attention against a slow loop, and the whole D-Abstractor against a hand-written forward pass."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from prism_deco.config import load_choice
from prism_deco.projectors import build_projector
from prism_deco.projectors.attention import DeformableAttention, SelfAttention, sample
from prism_deco.projectors.d_abstractor import reference_points

GRID, SIDE, IN_DIM, DIM, OUT_DIM, HEADS, POINTS = (5, 7), 3, 10, 16, 6, 4, 3


def build(in_dim=IN_DIM, out_dim=OUT_DIM, **options):
    options = {"hidden_dim": DIM, "heads": HEADS, "points": POINTS, "ffn_dim": 12} | options
    return build_projector("d_abstractor", in_dim, out_dim, GRID, SIDE**2, **options)


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, and with all parameters away from their initial zeros and ones."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def slow_sample(values, locations, weights, grid):
    """One point at a time: the four patches around it, each by its share of the area; none outside."""
    height, width = grid
    images, _, heads, channels = values.shape
    out = np.zeros((images, locations.shape[1], heads, channels))
    for b, m, h, p in np.ndindex(locations.shape[:4]):
        x, y = locations[b, m, h, p, 0] * width - 0.5, locations[b, m, h, p, 1] * height - 0.5
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                    out[b, m, h] += weights[b, m, h, p] * share * values[b, row * width + column, h]
    return out


def layer_norm(x, state, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def self_attention(x, position, state, name):
    """Torch's own attention, which takes queries, keys and values apart."""
    parts = [f"{name}.{part}" for part in ("query", "key", "value")]
    out, _ = F.multi_head_attention_forward(
        (x + position).transpose(0, 1),
        (x + position).transpose(0, 1),
        x.transpose(0, 1),
        DIM,
        HEADS,
        in_proj_weight=torch.cat([state[f"{part}.weight"] for part in parts]),
        in_proj_bias=torch.cat([state[f"{part}.bias"] for part in parts]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=state[f"{name}.out.weight"],
        out_proj_bias=state[f"{name}.out.bias"],
    )
    return out.transpose(0, 1)


def deformable_attention(queries, memory, reference, state, name):
    images, tokens = queries.shape[:2]
    offsets = linear(queries, state, f"{name}.offsets").view(images, tokens, HEADS, POINTS, 2)
    locations = reference.view(-1, tokens, 1, 1, 2) + offsets / torch.tensor([GRID[1], GRID[0]])
    weights = linear(queries, state, f"{name}.weights").view(images, tokens, HEADS, POINTS).softmax(-1)
    values = linear(memory, state, f"{name}.value").view(images, -1, HEADS, DIM // HEADS)
    sampled = slow_sample(values.numpy(), locations.numpy(), weights.numpy(), GRID)
    return linear(torch.from_numpy(sampled).flatten(2), state, f"{name}.out")


def by_hand(features, state, depth, pooled_is_content):
    memory = linear(features, state, "input") + state["position"]
    pooled = F.adaptive_avg_pool2d(memory.transpose(1, 2).reshape(-1, DIM, *GRID), SIDE).flatten(2).transpose(1, 2)
    learned = state["queries.weight"].expand_as(pooled)
    x, position = (pooled, learned) if pooled_is_content else (learned, pooled)
    for layer in (f"layers.{index}" for index in range(depth)):
        x = layer_norm(x + self_attention(x, position, state, f"{layer}.self_attention"), state, f"{layer}.self_norm")
        seen = deformable_attention(x + position, memory, state["reference"], state, f"{layer}.cross_attention")
        x = layer_norm(x + seen, state, f"{layer}.cross_norm")
        hidden = linear(x, state, f"{layer}.ffn.0").clamp(min=0)
        x = layer_norm(x + linear(hidden, state, f"{layer}.ffn.2"), state, f"{layer}.ffn_norm")
    return linear(x, state, "output")


def random_points(images=2, tokens=4, heads=3, points=2, channels=5, grid=GRID):
    """Locations also lie on and outside the edges."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(images, grid[0] * grid[1], heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(images, tokens, heads, points, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    locations[0, 0, 0, 0] = torch.tensor([0.5 / grid[1], 0.5 / grid[0]])
    locations[0, 1, 0, 0] = torch.tensor([1.0, 0.0])
    weights = torch.randn(images, tokens, heads, points, generator=generator, dtype=torch.float64).softmax(-1)
    return values, locations, weights


@pytest.mark.parametrize("grid", [(5, 7), (4, 4), (1, 6)], ids=str)
def test_sampling(grid):
    values, locations, weights = random_points(grid=grid)
    expected = slow_sample(values.numpy(), locations.numpy(), weights.numpy(), grid)
    torch.testing.assert_close(sample(values, locations, weights, grid).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_sampling_gradients():
    values, locations, weights = random_points(images=1, tokens=2, heads=2, channels=2)
    locations[0, 0, 0, 0] += 0.01  # off the centre of a patch, where the bilinear surface has a kink
    inputs = tuple(tensor.requires_grad_() for tensor in (values, locations, weights))
    assert torch.autograd.gradcheck(lambda *args: sample(*args, GRID), inputs)


def test_sampling_is_exact_in_bfloat16():
    """Coordinates keep float32: the result is the exact one, rounded."""
    values, locations, weights = random_points()
    low = values.to(torch.bfloat16)
    expected = slow_sample(low.double().numpy(), locations.numpy(), weights.numpy(), GRID)
    out = sample(low, locations.float(), weights.float(), GRID)
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=2**-7, atol=1e-5)


def test_directional_start():
    attention = DeformableAttention(dim=16, heads=8, points=4, grid=(6, 6), directional=True)
    offsets = attention.offsets.bias.view(8, 4, 2)
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor([[(x * p, y * p) for p in (1, 2, 3, 4)] for x, y in compass], dtype=torch.float32)
    torch.testing.assert_close(offsets, expected, rtol=0, atol=1e-5)
    queries, memory = torch.randn(1, 3, 16), torch.randn(1, 36, 16)
    _, seen = attention(queries, memory, torch.full((1, 3, 2), 0.25))
    torch.testing.assert_close(seen.weights, torch.full((1, 3, 8, 4), 0.25))
    torch.testing.assert_close(seen.locations[0, 2, 1, 3], torch.tensor([0.25 + 4 / 6, 0.25 + 4 / 6]))
    bound = math.sqrt(6 / 32)  # Xavier: uniform within sqrt(6 / (fan_in + fan_out))
    for layer in (attention.value, attention.out):
        assert 0.9 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


def test_normal_start():
    attention = DeformableAttention(dim=64, heads=8, points=4, grid=(6, 6))
    for layer in (attention.offsets, attention.weights, attention.value, attention.out):
        assert layer.weight.detach().std() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()


def test_reference_points():
    points = reference_points((12, 12), (24, 24))
    assert points.shape == (1, 144, 2)
    assert points.min() == pytest.approx(0.5 / 24) and points.max() == pytest.approx(23.5 / 24)
    step = 23 / 11 / 24
    # Row-major, (x, y): token 1 is one step to the right of token 0, token 12 one step below.
    torch.testing.assert_close(points[0, 1] - points[0, 0], torch.tensor([step, 0.0]))
    torch.testing.assert_close(points[0, 12] - points[0, 0], torch.tensor([0.0, step]))
    wide = reference_points((2, 2), (4, 8))
    torch.testing.assert_close(wide[0, 3], torch.tensor([7.5 / 8, 3.5 / 4]))


def honeybee_start(name: str, parameter: torch.Tensor, out_grid: tuple[int, int], grid: tuple[int, int]) -> None:
    """What a tensor of Honeybee's model is after the `post_init` of its whole model: every linear layer and embedding
    is drawn anew, Deformable DETR's directional offsets among them; norms and plain parameters are left alone."""
    values = parameter.detach()
    if name == "reference":
        y, x = (np.linspace(0.5, n - 0.5, m) / n for n, m in zip(grid, out_grid, strict=True))
        expected = np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=-1)[None]
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)
    elif name.endswith("norm.weight"):
        assert (values == 1).all(), name
    elif name.endswith(".bias"):
        assert not values.any(), name
    else:
        assert values.std() == pytest.approx(0.02, rel=0.1) and abs(values.mean()) < 0.003, name


def test_the_start_is_honeybees():
    """Behind CLIP-L, as its YAML builds it: no input layer, 2 decoder layers, 57 tensors."""
    torch.manual_seed(0)
    options = load_choice("projector", "d_abstractor")
    options |= {"num_tokens": 144, "init": "normal"}
    projector = build_projector(options.pop("name"), 1024, 96, (24, 24), **options)
    tensors = dict(projector.named_parameters())
    assert len(tensors) == 57
    for name, parameter in tensors.items():
        honeybee_start(name, parameter, (12, 12), (24, 24))
    directional = build_projector("d_abstractor", 1024, 96, (24, 24), 144, directional_offsets=True)
    others = [n for n, p in directional.named_parameters() if _differs(n, p)]
    parts = ("offsets.weight", "offsets.bias", "weights.weight", "value.weight", "out.weight")
    assert others == [f"layers.{layer}.cross_attention.{part}" for layer in (0, 1) for part in parts]


def _differs(name: str, parameter: torch.Tensor) -> bool:
    try:
        honeybee_start(name, parameter, (12, 12), (24, 24))
    except AssertionError:
        return True
    return False


def test_torchs_own_start_is_that_of_the_layers():
    """Honeybee's module before the `post_init` of its model: torch's bounds of 1 / sqrt(width) for linear layers, whose
    biases are drawn, too; queries from N(0, 1); Deformable DETR's start of its attention."""
    torch.manual_seed(0)
    state = build_projector("d_abstractor", 96, 48, (6, 6), 16, hidden_dim=64, ffn_dim=80, init="torch").state_dict()
    assert state["queries.weight"].std() == pytest.approx(1, rel=0.1)
    assert state["position"].std() == pytest.approx(0.02, rel=0.15)
    widths = {"input": 96, "output": 64, "layers.1.ffn.0": 64, "layers.1.ffn.2": 80, "layers.0.self_attention.key": 64}
    for name, width in widths.items():
        for part in ("weight", "bias"):
            largest = state[f"{name}.{part}"].abs().max().item() * math.sqrt(width)
            assert 0.9 < largest <= 1.0001, (name, part)
    for layer in (0, 1):
        attention = f"layers.{layer}.cross_attention"
        assert state[f"{attention}.offsets.bias"].abs().max() == 4 and not state[f"{attention}.offsets.weight"].any()
        bound = math.sqrt(6 / (64 + 64))  # Xavier
        assert 0.9 < state[f"{attention}.value.weight"].abs().max() / bound <= 1.0001
    with pytest.raises(ValueError, match="init='zeros' is unknown: choose normal or torch"):
        build(init="zeros")


@pytest.mark.parametrize("query_mode", ["query", "tgt"])
@pytest.mark.parametrize("directional_offsets", [True, False])
def test_forward(query_mode, directional_offsets):
    torch.manual_seed(0)
    projector = shake(build(query_mode=query_mode, directional_offsets=directional_offsets))
    features = torch.randn(2, GRID[0] * GRID[1], IN_DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand(features, projector.state_dict(), depth=2, pooled_is_content=query_mode == "tgt")
        torch.testing.assert_close(projector(features), expected, rtol=1e-9, atol=1e-9)


def test_autocast_changes_nothing():
    """The reference keeps the whole module in float32."""
    projector, features = build().eval(), torch.randn(1, GRID[0] * GRID[1], IN_DIM)
    expected = projector(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projector(features), expected)
        assert projector(features.bfloat16()).dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    projector, features = build(dropout=0.5), torch.randn(1, GRID[0] * GRID[1], IN_DIM)
    assert not torch.equal(projector(features), projector(features))
    projector.eval()
    assert torch.equal(projector(features), projector(features))


def test_equal_widths_have_no_projection():
    assert not list(build(in_dim=DIM).input.parameters())
    assert not list(build(out_dim=DIM).output.parameters())
    assert build(in_dim=DIM, out_dim=DIM)(torch.randn(1, GRID[0] * GRID[1], DIM)).shape == (1, SIDE**2, DIM)


def test_initialisation():
    torch.manual_seed(0)
    projector = build(hidden_dim=128, ffn_dim=128)
    layer = projector.layers[1]
    for weight in (
        projector.input.weight,
        projector.queries.weight,
        layer.self_attention.key.weight,
        layer.ffn[0].weight,
    ):
        assert weight.detach().std() == pytest.approx(0.02, rel=0.15)
    assert not any(
        layer.self_attention.get_parameter(f"{part}.bias").any() for part in ("query", "key", "value", "out")
    )
    assert torch.equal(layer.ffn_norm.weight, torch.ones(128))
    assert projector.position.detach().std() == pytest.approx(0.02, rel=0.15)


def test_hooks_see_what_relevance_needs():
    projector, features = build().eval(), torch.randn(2, GRID[0] * GRID[1], IN_DIM)
    seen: dict[str, list] = {"self": [], "cross": []}
    for layer in projector.layers:
        layer.self_attention.register_forward_hook(lambda module, args, out: seen["self"].append(out[1]))
        layer.cross_attention.register_forward_hook(lambda module, args, out: seen["cross"].append(out[1]))
    out = projector(features)
    tokens, head_dim = SIDE**2, DIM // HEADS
    assert [probabilities.shape for probabilities in seen["self"]] == [(2, HEADS, tokens, tokens)] * 2
    for probabilities, sampling in zip(seen["self"], seen["cross"], strict=True):
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, HEADS, tokens))
        torch.testing.assert_close(sampling.weights.sum(-1), torch.ones(2, tokens, HEADS))
        assert sampling.locations.shape == (2, tokens, HEADS, POINTS, 2)
        assert sampling.values.shape == (2, GRID[0] * GRID[1], HEADS, head_dim)
        again = sample(sampling.values, sampling.locations, sampling.weights, GRID)
        torch.testing.assert_close(sampling.sampled, again)
    targets = [*seen["self"], *(sampling.sampled for sampling in seen["cross"])]
    gradients = torch.autograd.grad(out[0, 0, 0], targets)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_user_mistakes():
    with pytest.raises(ValueError, match="query_mode='pooled'.*query or tgt"):
        build(query_mode="pooled")
    with pytest.raises(ValueError, match="hidden_dim=16.*heads=3"):
        build(heads=3)
    with pytest.raises(ValueError, match="depth=0"):
        build(depth=0)
    with pytest.raises(ValueError, match="hidden_dim=10.*heads=4"):
        SelfAttention(10, 4)
