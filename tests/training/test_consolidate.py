"""Checkpoints as model folders."""

import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prism_deco
from prism_deco.cli import main
from prism_deco.training.checkpoints import Checkpoint

FAST = ["data=llava", "data.val_fraction=0", "evaluate.benchmarks=null", "recipe.global_batch_size=4",
        "recipe.micro_batch_size=2", "trainer.threads=1", "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=9"]  # fmt: skip


def _train(colors, runs, *overrides):
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={runs}"]
    assert main(["train", *source, *FAST, "run_id=run", *overrides]) == 0
    return runs / "run"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["backbone.pretrained=false", "llm=mini_llama"],
        ["recipe.lm=lora", "recipe.lora_r=4"],
        ["recipe.tower=full", "recipe.tower_layers=2"],
        ["recipe.tower=lora", "recipe.lora_r=4"],
    ],
    ids=["pretrained tower", "random tower", "adapters on a random base", "trained tower", "adapters on the tower"],
)
def test_the_last_checkpoint_is_the_trained_model(colors, tmp_path, overrides):
    run = _train(colors, tmp_path, "recipe.epochs=1", *overrides)
    last = max(path.name for path in (run / "checkpoints").iterdir())
    assert main(["export", str(run), "--checkpoint", last, "--to", str(tmp_path / "model")]) == 0
    files, exported = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (run / "model", tmp_path / "model")
    )
    assert [name for name in files if name != "SHA256SUMS"] == [name for name in exported if name != "SHA256SUMS"]
    for name in files:
        if name.endswith(".safetensors"):
            assert (tmp_path / "model" / name).read_bytes() == (run / "model" / name).read_bytes(), name
    question = (["Which colors are there?"], 4)
    answers = [prism_deco.load(folder).generate([None], *question) for folder in (run, tmp_path / "model")]
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def trained(colors, tmp_path_factory):
    return _train(colors, tmp_path_factory.mktemp("runs"), "recipe.epochs=1")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_an_earlier_checkpoint_has_its_own_weights_and_a_broken_one_is_refused(run, tmp_path, capsys):
    first = sorted((run / "checkpoints").iterdir())[0]
    assert main(["export", str(run), "--checkpoint", first.name, "--to", str(tmp_path / "model")]) == 0
    weights, stored = load_file(tmp_path / "model" / "model.safetensors"), Checkpoint(first)
    assert all((weights[name] == stored.read(f"model.{name}")).all() for name in weights)
    assert any((weights[name] != value).any() for name, value in load_file(run / "model" / "model.safetensors").items())
    assert main(["export", str(run), "--checkpoint", "step_9", "--to", str(tmp_path / "other")]) == 2
    assert f"has no checkpoint step_9; it has: {first.name}" in " ".join(capsys.readouterr().err.split())
    index = json.loads((first / "index.json").read_text())
    (first / "index.json").write_text(json.dumps(index | {"files": []}))
    assert main(["export", str(run), "--checkpoint", first.name, "--to", str(tmp_path / "other")]) == 2
    assert "of the trained weights in all" in " ".join(capsys.readouterr().err.split())


def _flip(checkpoint):
    file = checkpoint / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _fill_with_nan(checkpoint):
    """With checksums that fit."""
    file = checkpoint / "rank_00000.safetensors"
    with safe_open(file, "pt") as stored:
        places = stored.metadata()
    tensors = load_file(file)
    tensors["model.projector.mlp.0.weight"][:] = torch.nan
    save_file(tensors, file, places)
    index = json.loads((checkpoint / "index.json").read_text())
    index["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    (checkpoint / "index.json").write_text(json.dumps(index))


def _give_another(key, value):
    """As if another run had written it."""

    def change(checkpoint):
        index = json.loads((checkpoint / "index.json").read_text())
        owner = index["run"] if key in index["run"] else index["run"]["settings"]
        assert owner[key] != value
        owner[key] = value
        (checkpoint / "index.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_flip, "rank_00000.safetensors was damaged or replaced"),
        (_fill_with_nan, "model.projector.mlp.0.weight holds NaN or infinite numbers"),
        (_give_another("run_id", "other"), "belongs to run other ("),
        (_give_another("recipe.lr", 0.5), "belongs to another run named run: recipe.lr is 0.5 there and "),
    ],
    ids=["flipped bit", "NaN", "another run", "another run of that name"],
)
def test_a_checkpoint_that_is_not_what_the_run_wrote_is_not_exported(run, tmp_path, capsys, damage, says):
    checkpoint = sorted((run / "checkpoints").iterdir())[0]
    damage(checkpoint)
    assert main(["export", str(run), "--checkpoint", checkpoint.name, "--to", str(tmp_path / "model")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert says in said and str(checkpoint) in said and "Remove this checkpoint's folder" in said
    assert not (tmp_path / "model").exists()


def test_plug_ins_of_a_run_are_not_imported_unless_they_are_named(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "stranger.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("plugins: []", "plugins: [stranger]"))
    name = sorted(path.name for path in (run / "checkpoints").iterdir())[0]
    assert main(["export", str(run), "--checkpoint", name, "--to", str(tmp_path / "model")]) == 2
    assert f"{config} names plug-in modules: stranger." in " ".join(capsys.readouterr().err.split())
    assert "stranger" not in sys.modules
