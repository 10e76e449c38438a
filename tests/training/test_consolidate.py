"""Checkpoints as model folders."""

import json

import pytest
from safetensors.torch import load_file

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
    [[], ["backbone.pretrained=false", "llm=mini_llama"], ["recipe.lm=lora", "recipe.lora_r=4"]],
    ids=["pretrained tower", "random tower", "adapters on a random base"],
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


def test_an_earlier_checkpoint_has_its_own_weights_and_a_broken_one_is_refused(colors, tmp_path, capsys):
    run = _train(colors, tmp_path, "recipe.epochs=1")
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
