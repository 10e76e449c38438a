"""Which random stream the parts of a model are drawn from."""

import torch
from torch import nn

from prism_deco.backbones import build_backbone
from prism_deco.build import build_model, group, prompt_options
from prism_deco.config import load_config
from prism_deco.llms import build_llm
from prism_deco.projectors import build_projector


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, its) for (name, value), (other, its) in pairs)


def composed(*overrides: str, seed: int = 7):
    """The model, and what the run's stream gives next."""
    torch.manual_seed(seed)
    vlm, _ = build_model(load_config(overrides))
    return vlm, torch.rand(4)


def test_without_a_seed_of_its_own_the_projector_goes_on_in_the_runs_stream():
    config = load_config()
    vlm, after = composed()
    torch.manual_seed(7)
    backbone = build_backbone(group(config, "backbone"))
    llm = build_llm(group(config, "llm"), **prompt_options(config))
    options = group(config, "projector")
    projector = build_projector(options.pop("name"), backbone.embed_dim, llm.embed_dim, backbone.grid, **options)
    assert equal(vlm.projector, projector) and equal(vlm.lm, llm.model)
    assert torch.equal(after, torch.rand(4))


def test_seeded_with_the_towers_width_the_projector_is_the_same_in_every_run_and_the_stream_is_left_alone():
    """prismatic builds it right behind `torch.manual_seed(embed_dim)`: two torch layers on the pooled features."""
    first, after = composed("recipe.projector_seed=tower_width")
    second, other = composed("recipe.projector_seed=tower_width", seed=8)
    width, out = first.backbone.embed_dim, first.lm.get_input_embeddings().embedding_dim
    torch.manual_seed(width)
    theirs = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
    for vlm in (first, second):
        assert all(map(torch.equal, vlm.projector.state_dict().values(), theirs.state_dict().values()))
    assert not torch.equal(after, other)
    # The stream goes on as if there were no projector.
    config = load_config()
    torch.manual_seed(7)
    build_backbone(group(config, "backbone"))
    build_llm(group(config, "llm"), **prompt_options(config))
    assert torch.equal(after, torch.rand(4))


def test_both_towers_count_in_an_ensemble():
    options = ["backbone=mini_dinov2_siglip", "recipe.projector_seed=tower_width"]
    vlm, _ = composed(*options)
    torch.manual_seed(96 + 96)
    assert torch.equal(next(vlm.projector.parameters()), nn.Linear(192, 128).weight)


def test_a_bare_model_draws_nothing():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    build_model(load_config(["recipe.projector_seed=tower_width"]), device="meta")
    assert torch.equal(torch.rand(4), expected)
