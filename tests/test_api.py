"""`prism_deco.load`: one copy of the weights, nothing drawn for the LLM, nothing read twice, every gap named."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import prism_deco
from prism_deco.api import Model
from prism_deco.build import build_model
from prism_deco.config import load_config, read_config, save_config

SMALL = ["projector=qformer", "projector.hidden_dim=24", "projector.ffn_dim=48"]


class RandomDraws(TorchDispatchMode):
    """Counts the random numbers drawn into real memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {"normal_", "uniform_"} & {func._schema.name.partition("::")[2]} and not args[0].is_meta:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model():
    config = load_config(["llm=mini_qwen2", "recipe.standardise_features=true", "run_id=test", *SMALL])
    torch.manual_seed(4)
    vlm, llm = build_model(config)
    return Model(vlm.eval(), llm, config)


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "export")
    return tmp_path / "export"


def test_nothing_is_drawn_for_the_llm_and_the_seed_stays(folder, model):
    projector = sum(p.numel() for p in model.vlm.projector.parameters())
    language = sum(p.numel() for p in model.vlm.lm.parameters())
    state = torch.get_rng_state()
    with RandomDraws() as draws:
        loaded = prism_deco.load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert draws.count <= 2 * projector < language
    with RandomDraws() as draws:
        build_model(model.config)
    assert draws.count > language / 2, "the counter must see what an ordinary build draws"
    assert not any(tensor.is_meta for tensor in (*loaded.vlm.parameters(), *loaded.vlm.buffers()))


def test_computed_buffers_and_ties_are_those_of_an_ordinary_build(folder, model):
    loaded = prism_deco.load(folder)
    ours, theirs = dict(model.vlm.named_buffers()), dict(loaded.vlm.named_buffers())
    assert ours.keys() == theirs.keys() and any("inv_freq" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    lm = loaded.vlm.lm
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    trained = {name for name, p in model.vlm.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.vlm.named_parameters() if p.requires_grad} == trained


def test_the_projectors_first_weights_are_not_looked_for(folder, model):
    config = read_config(folder / "config.yaml")
    config.projector.weights = "gone.safetensors"
    save_config(config, folder / "config.yaml")
    loaded = prism_deco.load(folder)
    for name, tensor in model.vlm.projector.state_dict().items():
        assert torch.equal(loaded.vlm.projector.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "lm.model.norm.weight"}, "missing lm.model.norm.weight"),
        (
            lambda w: {k: v for k, v in w.items() if "embed" not in k and "lm_head" not in k},
            "missing lm.lm_head.weight",
        ),
        (lambda w: w | {"lm.extra": torch.zeros(2)}, "unexpected lm.extra"),
        (lambda w: w | {"lm.model.norm.weight": torch.zeros(3)}, "lm.model.norm.weight: copying a param with shape"),
        (lambda w: {k: v for k, v in w.items() if k != "feature_mean"}, "missing feature_mean"),
    ],
)
def test_what_does_not_fit_is_named(folder, change, message):
    file = folder / "model.safetensors"
    save_file(change({name: tensor.clone() for name, tensor in load_file(file).items()}), file)
    with pytest.raises(ValueError) as error:
        prism_deco.load(folder)
    assert message in " ".join(str(error.value).split())


def test_half_precision_leaves_computed_buffers_exact(folder, model):
    loaded = prism_deco.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.vlm.parameters()} == {torch.bfloat16}
    assert loaded.vlm.feature_mean.dtype == torch.bfloat16
    exact = model.vlm.lm.model.rotary_emb.inv_freq
    assert torch.equal(loaded.vlm.lm.model.rotary_emb.inv_freq, exact) and exact.dtype == torch.float32
