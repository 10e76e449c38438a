"""C-Abstractor against the RegNet bottleneck written out by hand."""

import pytest
import torch
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn
from torch.nn import functional as F

from prism_deco.projectors import build_projector

IN_DIM, HIDDEN, OUT_DIM, GRID = 12, 8, 6, (7, 5)


def build(**options):
    return build_projector("c_abstractor", IN_DIM, OUT_DIM, GRID, 9, **{"hidden_dim": HIDDEN, "depth": 2} | options)


def channel_norm(x, state, name):
    """Each pixel's channels to mean 0 and variance 1, then scale and shift."""
    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def silu(x):
    return x / (1 + (-x).exp())


def pointwise(x, weight):
    return torch.einsum("bchw,oc->bohw", x, weight[:, :, 0, 0])


def depthwise(x, weight):
    """3x3 per channel, zeros outside."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    return sum(
        padded[:, :, dy : dy + height, dx : dx + width] * weight[:, 0, dy, dx, None, None]
        for dy in range(3)
        for dx in range(3)
    )


def squeeze_excite(x, state, name):
    mean = x.mean(dim=(2, 3), keepdim=True)
    inner = silu(pointwise(mean, state[f"{name}.fc1.weight"]) + state[f"{name}.fc1.bias"][:, None, None])
    outer = pointwise(inner, state[f"{name}.fc2.weight"]) + state[f"{name}.fc2.bias"][:, None, None]
    return x / (1 + (-outer).exp())


def bottleneck(x, state, name):
    y = silu(channel_norm(pointwise(x, state[f"{name}.conv1.conv.weight"]), state, f"{name}.conv1.bn"))
    y = silu(channel_norm(depthwise(y, state[f"{name}.conv2.conv.weight"]), state, f"{name}.conv2.bn"))
    y = squeeze_excite(y, state, f"{name}.se")
    y = channel_norm(pointwise(y, state[f"{name}.conv3.conv.weight"]), state, f"{name}.conv3.bn")
    shortcut = x
    if f"{name}.downsample.conv.weight" in state:
        shortcut = channel_norm(pointwise(x, state[f"{name}.downsample.conv.weight"]), state, f"{name}.downsample.bn")
    return silu(y + shortcut)


def by_hand(features, state):
    x = (features + state["position"]).transpose(1, 2).reshape(-1, IN_DIM, *GRID)
    for block in ("stage1.b1", "stage1.b2"):
        x = bottleneck(x, state, block)
    x = F.adaptive_avg_pool2d(x, (3, 3))
    for block in ("stage2.b1", "stage2.b2"):
        x = bottleneck(x, state, block)
    x = x.flatten(2).transpose(1, 2)
    x = silu(x @ state["readout.0.weight"].T + state["readout.0.bias"])
    return x @ state["readout.2.weight"].T + state["readout.2.bias"]


@pytest.fixture
def projector():
    """In float64, and with all parameters away from their initial zeros and ones."""
    torch.manual_seed(0)
    module = build().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def test_forward(projector):
    features = torch.randn(2, GRID[0] * GRID[1], IN_DIM, dtype=torch.float64)
    torch.testing.assert_close(projector(features), by_hand(features, projector.state_dict()), rtol=1e-9, atol=1e-10)


def test_gradient(projector):
    features = torch.randn(1, GRID[0] * GRID[1], IN_DIM, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 9, OUT_DIM, dtype=torch.float64)
    state = {name: parameter.detach() for name, parameter in projector.state_dict().items()}
    (ours,) = torch.autograd.grad(projector(features), features, cotangent)
    (expected,) = torch.autograd.grad(by_hand(features, state), features, cotangent)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_shapes_of_the_blocks():
    state = build().state_dict()
    # Squeeze to a quarter of the block's input channels: round(12 / 4) in the first, 8 / 4 in the others.
    assert state["stage1.b1.se.fc1.weight"].shape == (3, HIDDEN, 1, 1)
    assert state["stage1.b2.se.fc1.weight"].shape == (2, HIDDEN, 1, 1)
    assert state["stage1.b1.conv2.conv.weight"].shape == (HIDDEN, 1, 3, 3)
    assert "stage1.b1.downsample.conv.weight" in state and "stage2.b1.downsample.conv.weight" not in state
    assert "stage1.b1.conv1.conv.bias" not in state


def test_options():
    assert build(position_embedding=False).position is None
    assert [tuple(layer.weight.shape) for layer in build(readout_depth=3).readout[::2]] == [(6, 8), (6, 6), (6, 6)]
    with pytest.raises(ValueError, match="depth=0"):
        build(depth=0)


def test_initialisation():
    torch.manual_seed(0)
    module = build(hidden_dim=256)
    state = module.state_dict()
    for name in ("stage1.b1.conv1.conv.weight", "stage2.b2.conv3.conv.weight", "stage1.b2.se.fc1.weight"):
        assert state[name].std() == pytest.approx(0.02, rel=0.1) and abs(state[name].mean()) < 0.002
    assert state["position"].std() == pytest.approx(0.02, rel=0.15) and state["position"].abs().max() < 0.1
    for name, value in state.items():
        if ".bn.weight" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith("bias"):
            assert not value.any(), name


def test_torchs_own_initialisation_is_that_of_the_layers_alone():
    torch.manual_seed(0)
    state = build(init="torch").state_dict()
    torch.manual_seed(0)
    position = nn.init.trunc_normal_(torch.empty(1, GRID[0] * GRID[1], IN_DIM), std=0.02)  # first in the authors' code
    options = {"stride": 1, "dilation": 1, "act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
    parts = {
        "stage1": RegStage(2, IN_DIM, HIDDEN, **options),
        "stage2": RegStage(2, HIDDEN, HIDDEN, **options),
        "readout": nn.Sequential(nn.Linear(HIDDEN, OUT_DIM), nn.SiLU(), nn.Linear(OUT_DIM, OUT_DIM)),
    }
    expected = {
        f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
    }
    assert state.keys() == expected.keys() | {"position"} and torch.equal(state["position"], position)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    with pytest.raises(ValueError, match="init='zeros' is unknown: choose normal or torch"):
        build(init="zeros")
