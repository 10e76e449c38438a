"""Q-Former against BERT's layers written out by hand."""

import math

import pytest
import torch

from prism_deco.projectors import build_projector

IN_DIM, DIM, OUT_DIM, GRID, TOKENS, HEADS, FFN = 10, 12, 6, (4, 5), 9, 3, 20


def build(**options):
    options = {"hidden_dim": DIM, "heads": HEADS, "ffn_dim": FFN} | options
    return build_projector("qformer", IN_DIM, OUT_DIM, GRID, TOKENS, **options)


def layer_norm(x, state, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(x, source, state, name):
    """The sub-layer: attention, projection, shortcut, norm; and its probabilities [B, H, M, K]."""

    def heads(tensor):
        return tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    query = heads(linear(x, state, f"{name}.attention.query"))
    key = heads(linear(source, state, f"{name}.attention.key"))
    value = heads(linear(source, state, f"{name}.attention.value"))
    probabilities = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
    mixed = (probabilities @ value).transpose(1, 2).flatten(2)
    return layer_norm(
        x + linear(mixed, state, f"{name}.output.dense"), state, f"{name}.output.LayerNorm"
    ), probabilities


def by_hand(features, state, depth):
    if "input.weight" in state:
        features = linear(features, state, "input")
    x = layer_norm(state["queries"], state, "body.layernorm").expand(len(features), -1, -1)
    maps = []
    for index in range(depth):
        layer = f"body.encoder.layer.{index}"
        x, probabilities = attention(x, x, state, f"{layer}.attention")
        maps.append(("self", probabilities))
        if index % 2 == 0:
            x, probabilities = attention(x, features, state, f"{layer}.crossattention")
            maps.append(("cross", probabilities))
        hidden = linear(x, state, f"{layer}.intermediate_query.dense")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = linear(hidden, state, f"{layer}.output_query.dense")
        x = layer_norm(x + hidden, state, f"{layer}.output_query.LayerNorm")
    return linear(x, state, "readout.0"), maps


def shaken(**options):
    """In float64, and with all parameters away from their initial zeros and ones."""
    torch.manual_seed(0)
    projector = build(**options).double().eval()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return projector, torch.randn(2, GRID[0] * GRID[1], IN_DIM, dtype=torch.float64)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_forward(depth):
    projector, features = shaken(depth=depth)
    expected, _ = by_hand(features, projector.state_dict(), depth)
    torch.testing.assert_close(projector(features), expected, rtol=1e-9, atol=1e-10)


FROM_SCRATCH = {"hidden_dim": None, "ffn_dim": None, "dropout": 0.0, "input_dim": 14, "query_std": 0.0}
FROM_SCRATCH |= {"init": "normal"}


def test_the_authors_own_has_the_width_of_the_llm_and_a_linear_layer_in_front():
    projector, features = shaken(**FROM_SCRATCH)
    state = projector.state_dict()
    assert state["queries"].shape == (1, TOKENS, OUT_DIM) and state["input.weight"].shape == (14, IN_DIM)
    assert state["body.encoder.layer.1.intermediate_query.dense.weight"].shape == (4 * OUT_DIM, OUT_DIM)
    expected, _ = by_hand(features, state, depth=2)
    torch.testing.assert_close(projector.train()(features), expected, rtol=1e-9, atol=1e-10)  # without dropout


def test_the_authors_own_starts_from_zero_queries_and_small_normal_weights():
    torch.manual_seed(0)
    projector = build_projector("qformer", 80, 96, GRID, TOKENS, **FROM_SCRATCH | {"heads": 4, "input_dim": 90})
    assert not projector.queries.any()
    for name, parameter in projector.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 2:
            assert parameter.detach().std() == pytest.approx(0.02, rel=0.05), name
    with pytest.raises(ValueError, match="init='zeros' is unknown"):
        build(init="zeros")


def test_two_layers_have_one_cross_attention():
    names = [name for name, _ in build().body.named_modules() if name.endswith(".crossattention")]
    assert names == ["encoder.layer.0.crossattention"]


def test_attention_maps_are_reachable():
    projector, features = shaken(depth=3)
    before = projector(features)
    _, expected = by_hand(features, projector.state_dict(), depth=3)
    seen = []
    modules = projector.expose_attention()
    for _, module in modules:
        module.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    out = projector(features)
    torch.testing.assert_close(out, before)
    assert [kind for kind, _ in modules] == [kind for kind, _ in expected]
    for ours, (_, theirs) in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradients = torch.autograd.grad(out[0, 0, 0], seen)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_initialisation():
    torch.manual_seed(0)
    projector = build(hidden_dim=96)
    assert projector.queries.shape == (1, TOKENS, 96)
    assert projector.queries.detach().std() == pytest.approx(0.02, rel=0.1)
    assert projector.body.encoder.layer[0].crossattention.attention.key.weight.detach().std() == pytest.approx(
        0.02, rel=0.1
    )


def test_dropout_acts_in_training_only():
    projector, features = build(dropout=0.5), torch.randn(1, GRID[0] * GRID[1], IN_DIM)
    assert not torch.equal(projector(features), projector(features))
    projector.eval()
    assert torch.equal(projector(features), projector(features))


def test_options():
    assert [tuple(layer.weight.shape) for layer in build(readout_depth=2).readout[::2]] == [(6, 12), (6, 6)]
    with pytest.raises(ValueError, match="depth=0"):
        build(depth=0)
    with pytest.raises(ValueError, match="12.*heads.*5"):
        build(heads=5)
