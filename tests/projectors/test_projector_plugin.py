"""A seventh projector from outside the package: the module and the YAML in `example/`, and nothing else."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from prism_deco.config import load_config
from prism_deco.config.registry import import_plugins
from prism_deco.projectors import PROJECTORS, build_projector

EXAMPLE = Path(__file__).parent / "example"


@pytest.fixture
def on_path(monkeypatch):
    """The example's folder on sys.path, as PYTHONPATH would have it; the registry is put back afterwards."""
    monkeypatch.syspath_prepend(EXAMPLE)
    PROJECTORS.names()  # what is imported while the copy stands would be lost with it
    monkeypatch.setattr(PROJECTORS, "_entries", dict(PROJECTORS._entries))
    yield
    sys.modules.pop("token_merge", None)


def test_plugin(on_path):
    config = load_config([f"projector={EXAMPLE / 'token_merge.yaml'}", "projector.hidden_dim=32"])
    assert config.plugins == ["token_merge"]
    assert "token_merge" not in PROJECTORS.names()
    import_plugins(config.plugins)
    options = OmegaConf.to_container(config.projector, resolve=True)
    assert options == {"name": "token_merge", "num_tokens": config.recipe.num_tokens, "hidden_dim": 32}
    options["num_tokens"] = 4
    projector = build_projector(options.pop("name"), in_dim=3, out_dim=5, in_grid=(4, 6), **options)

    features = torch.randn(2, 24, 3)
    blocks = features.view(2, 2, 2, 2, 3, 3).transpose(2, 3).reshape(2, 4, 18)  # [image, row, column, (2 x 3 patches)]
    torch.testing.assert_close(projector(features), projector.mlp(blocks))
    with pytest.raises(ValueError, match="equal blocks"):
        build_projector("token_merge", in_dim=3, out_dim=5, in_grid=(5, 6), num_tokens=4)


def test_missing_plugin():
    with pytest.raises(ValueError, match="PYTHONPATH"):
        import_plugins(["token_merge_that_is_not_there"])
