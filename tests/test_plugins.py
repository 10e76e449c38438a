"""Opening a folder runs no code that its author chose: plug-ins are those that the user names."""

import io
import json
import sys

import pytest
import torch
from PIL import Image

import prism_deco
from prism_deco.api import Model
from prism_deco.build import build_model
from prism_deco.cli import main
from prism_deco.config import load_config, read_config, save_config
from prism_deco.training.model_folder import read_sums, trained_sha256


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder that names the plug-in `stranger`, which leaves a file where it is imported."""
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(["recipe.standardise_features=false", "run_id=run"])
    vlm, llm = build_model(config)
    Model(vlm.eval(), llm, config).save(tmp_path / "run/model")
    stored = read_config(tmp_path / "run/model/config.yaml")
    stored.plugins = ["stranger"]
    for path in (tmp_path / "run/model/config.yaml", tmp_path / "run/config.yaml"):
        save_config(stored, path)
    manifest = {"benchmarks": None, "model_sha256": trained_sha256(read_sums(tmp_path / "run/model"))}
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    yield tmp_path / "run"
    sys.modules.pop("stranger", None)


def _commands(run):
    image = ["--image", str(run.parent / "a.png")]
    return {
        "chat": ["chat", str(run), *image],
        "export": ["export", str(run), "--to", str(run.parent / "exported")],
        "explain": ["explain", str(run), *image, "--prompt", "What is it?", "--answer", "a"],
        "evaluate": ["evaluate", str(run), "benchmark=mini_pope"],
        "train": ["train", str(run / "config.yaml"), "--check"],
    }


@pytest.mark.parametrize("command", ["chat", "export", "explain", "evaluate", "train"])
def test_a_command_imports_what_it_is_told_to(run, command, capsys):
    arguments = _commands(run)[command]
    assert main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "names plug-in modules: stranger." in said and "plugins=[stranger] on the command line" in said
    assert not (run.parent / "imported").exists()
    code = main([*arguments, "plugins=[stranger]"])
    assert (run.parent / "imported").exists()
    # The benchmark's files are not there; everything else has what it needs.
    assert code == (2 if command == "evaluate" else 0), capsys.readouterr().err


def test_python_names_them_too(run):
    with pytest.raises(ValueError, match=r"names plug-in modules: stranger\..*load\(\.\.\., plugins=\['stranger'\]\)"):
        prism_deco.load(run)
    assert not (run.parent / "imported").exists()
    model = prism_deco.load(run, plugins=["stranger"])
    assert (run.parent / "imported").exists()
    assert isinstance(next(model.vlm.parameters()), torch.nn.Parameter)
    prism_deco.load(run)  # imported already: nothing more would run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["plugin=[stranger]"], "Did you mean 'plugins'"),
        (["x"], "'x' is not an"),
    ],
)
def test_other_settings_are_refused(run, settings, message, capsys):
    for command in ("chat", "export"):
        assert main([*_commands(run)[command], *settings]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
