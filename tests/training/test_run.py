"""Whole runs through the command line: real trainers, real files, fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prism_deco
from prism_deco.cli import main
from prism_deco.config import load_config, read_config
from prism_deco.training.module import TrainingModule

FAST = ["data.val_fraction=0", "data.num_workers=0", "evaluate.benchmarks=null", "recipe.global_batch_size=4",
        "recipe.micro_batch_size=2", "trainer.log_every=1", "trainer.threads=1",
        "backbone.pretrained=false"]  # fmt: skip


def _train(colors: Path, runs: Path, *overrides: str) -> int:
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={runs}"]
    return main(["train", "data=llava", *source, *FAST, *overrides])


def _scalars(run: Path, tag: str) -> list[float]:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [event.value for event in board.Scalars(tag)]


@pytest.fixture(scope="module")
def runs(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 1), ("again", 1), ("other", 2)):
        assert _train(colors, folder, f"seed={seed}", f"run_id={name}", "recipe.epochs=2", "data.val_fraction=0.3") == 0
    return folder


def test_the_same_seed_gives_the_same_run(runs):
    losses = {name: _scalars(runs / name, "train/loss") for name in ("a", "again", "other")}
    assert len(losses["a"]) == json.loads((runs / "a" / "manifest.json").read_text())["steps"]
    assert losses["a"] == losses["again"]
    assert losses["a"] != losses["other"]
    hashes = {name: json.loads((runs / name / "manifest.json").read_text())["model_sha256"] for name in losses}
    assert hashes["a"] == hashes["again"] != hashes["other"]
    assert _scalars(runs / "a", "val/loss") == _scalars(runs / "again", "val/loss") != []


def test_validation_makes_no_inference_tensors(colors, tmp_path, monkeypatch):
    """FSDP keeps buffers of its first forward pass, and cannot train on those of a validation in inference mode."""
    validate, modes = TrainingModule.validation_step, []

    def record(self, *batch):
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return validate(self, *batch)

    monkeypatch.setattr(TrainingModule, "validation_step", record)
    assert _train(colors, tmp_path, "data.val_fraction=0.3") == 0
    assert set(modes) == {(False, False)}


def test_tensorboard_holds_what_a_user_watches(runs):
    board = EventAccumulator(str(runs / "a" / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {
        "train/loss", "train/grad_norm", "train/grad_norm_projector", "train/grad_norm_lm", "train/lr/lm/decay",
        "train/lr/projector/no_decay", "train/samples_per_s", "train/supervised_tokens_per_s", "val/loss",
    } <= tags  # fmt: skip
    # TensorBoard opens the first two groups, in alphabetical order.
    assert {tag.partition("/")[0] for tag in [*tags, *board.Tags()["images"]]} == {"train", "val"}
    assert any(tag.startswith("val/sample_") for tag in board.Tags()["images"])
    assert any(tag.startswith("val/sample_") for tag in board.Tags()["tensors"])
    rates = _scalars(runs / "a", "train/lr/lm/decay")
    assert rates[0] == 0.0 and rates[-1] < max(rates) < load_config().recipe.lr


def _flat(row: dict, prefix: str = "") -> dict[str, float]:
    flat = {}
    for name, value in row.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def test_tensorboard_and_metrics_have_the_same_names_steps_and_numbers(runs):
    """Of every scalar in metrics.jsonl, and no other point: none at step 0."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (runs / "a" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in _flat(row).items():
            points.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    board = EventAccumulator(str(runs / "a" / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/lr/lm/decay", "val/loss"} <= points.keys() <= set(board.Tags()["scalars"])
    for name, expected in points.items():
        assert [(event.step, event.value) for event in board.Scalars(name)] == expected, name


def test_the_run_folder_describes_itself(runs, colors):
    run = runs / "a"
    manifest = json.loads((run / "manifest.json").read_text())
    model = prism_deco.load(run)
    trained = sum(p.numel() for part in (model.vlm.projector, model.vlm.lm) for p in part.parameters())
    tower = sum(p.numel() for p in model.vlm.backbone.parameters())
    assert manifest["params"] == {"total": trained + tower, "trained": trained}
    assert manifest["tokens"] == {"visual_in": 64, "visual_out": 16}
    assert manifest["packages"]["torch"] == torch.__version__.partition("+")[0] or manifest["packages"]["torch"]
    assert model.config == read_config(run / "config.yaml"), "what is loaded must say what was trained"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert "2 visual" not in (run / "train.log").read_text() and "Training a" in (run / "train.log").read_text()
    assert manifest["samples"] == 2 * _train_size(run, colors)


def _train_size(run: Path, colors: Path) -> int:
    from prism_deco.data.records import hold_out, open_records

    return len(hold_out(open_records(colors / "train.json", run), 0.3)[0])


PROBE = """
import sys, torch, prism_deco
from prism_deco.sequence import build_batch
model = prism_deco.load(sys.argv[1])
talk = [{"role": "user", "content": "<image>\\nWhat color is it?"}, {"role": "assistant", "content": "red"}]
from PIL import Image
tokens = torch.stack(model.encode_images([Image.new("RGB", (50, 70), (200, 30, 30))]))
batch = build_batch([model.llm.encode(talk, num_images=1)], tokens.shape[1])
with torch.no_grad():
    torch.save(model.vlm.logits(model.vlm.hidden_states(batch, tokens)), sys.argv[2])
"""


@pytest.mark.slow
def test_a_fresh_process_loads_bit_equal_logits(runs, tmp_path):
    logits = []
    for i in range(2):
        out = tmp_path / f"{i}.pt"
        environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
        subprocess.run([sys.executable, "-c", PROBE, str(runs / "a"), str(out)], check=True, env=environment)
        logits.append(torch.load(out, weights_only=True))
    assert torch.equal(*logits) and logits[0].abs().max() > 0


def test_other_weights_or_keys_are_not_loaded_in_silence(runs, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    run = shutil.copytree(runs / "a", tmp_path / "copy")
    (run / "model" / "SHA256SUMS").unlink()
    weights = load_file(run / "model" / "model.safetensors")
    name = "projector.mlp.0.weight"
    save_file({k: v for k, v in weights.items() if k != name}, run / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing {name}"):
        prism_deco.load(run)
    save_file(weights | {"extra": torch.zeros(1)}, run / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected extra"):
        prism_deco.load(run)
    save_file(weights, run / "model" / "model.safetensors")
    tower = load_file(run / "model" / "backbone.safetensors")
    key = next(iter(tower))
    save_file(tower | {key: tower[key] + 1}, run / "model" / "backbone.safetensors")
    with pytest.raises(ValueError, match="was trained with backbone weights of SHA-256"):
        prism_deco.load(run)
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has not finished, or its folder is incomplete"):
        prism_deco.load(run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.json=gone.json"], "data.json=gone.json: there is no such file"),
        (["data.image_root=gone"], "data.image_root=gone: there is no such folder"),
        (["recipe.learnrate=1"], "Unknown key recipe.learnrate"),
        (["projector.num_tokens=5"], "num_tokens=5 is not a square number"),
        (["projector.num_tokens=144"], "num_tokens=144 (12x12) does not fit the patch grid 8x8"),
        (["projector.num_tokens=16", "projector=linear"], "linear keeps all 64 patches"),
        (["evaluate.benchmarks=popo"], "Unknown benchmark 'popo'"),
        (["recipe.sampler=sorted"], "Unknown recipe.sampler 'sorted'"),
        (["recipe.image_slot=in_place"], "recipe.turn_mask=block needs recipe.image_slot=after_bos"),
        (["plugins=[no_such_module]"], "'no_such_module' cannot be imported"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(colors, tmp_path, capsys, overrides, message):
    assert _train(colors, tmp_path / "runs", *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("prism-deco: error: ") and message in error


def test_a_missing_image_is_named_before_training(colors, tmp_path, capsys):
    records = json.loads((colors / "train.json").read_text())
    records[3]["image"] = "lost.png"
    path = tmp_path / "t.json"
    path.write_text(json.dumps(records))
    assert _train(colors, tmp_path / "runs", f"data.json={path}", "run_id=x") == 2
    assert f"1 of 8 images are missing under {colors / 'images'}; the first is lost.png (record" in " ".join(
        capsys.readouterr().err.split()
    )
    assert _train(colors, tmp_path / "runs", f"data.json={path}", "run_id=y", "data.on_bad_image=skip") == 0
    assert json.loads((tmp_path / "runs" / "y" / "manifest.json").read_text())["bad_images"] == 1


def test_a_finished_run_is_left_alone_and_never_mixed_with_another(runs, colors, capsys, caplog):
    before = (runs / "a" / "manifest.json").stat().st_mtime_ns
    same = ["seed=1", "run_id=a", "recipe.epochs=2", "data.val_fraction=0.3"]
    assert _train(colors, runs, *same, "trainer.log_every=2", "recipe.micro_batch_size=1") == 0
    assert f"Run {runs / 'a'} is complete. Use run_id=NAME" in caplog.text
    assert _train(colors, runs, *same, "recipe.lr=1", "seed=3") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds a run of another configuration: recipe.lr was 0.0015 and is 1.0; seed was 1 and is 3." in error
    assert (runs / "a" / "manifest.json").stat().st_mtime_ns == before
    (runs / "notes").mkdir()
    (runs / "notes" / "todo.txt").write_text("keep me")
    assert _train(colors, runs, "run_id=notes") == 2
    assert "exists but is not a run folder (no config.yaml)" in " ".join(capsys.readouterr().err.split())


def test_what_auto_came_to_is_recorded(runs, colors):
    auto = "trainer.activation_checkpointing=auto"
    assert _train(colors, runs, "run_id=auto", "recipe.max_steps=1", auto) == 0
    assert read_config(runs / "auto" / "config.yaml").trainer.activation_checkpointing == "none"


def test_a_trained_run_is_only_scored(runs, colors):
    run = runs / "again"
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "trained"}))
    assert _train(colors, runs, "seed=1", "run_id=again", "recipe.epochs=2", "data.val_fraction=0.3") == 0
    assert json.loads((run / "status.json").read_text()) == status and status["state"] == "done"
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_debug_shows_the_traceback(colors, tmp_path):
    with pytest.raises(ValueError, match="Unknown key"):
        main(["train", "--debug", "nothing=1"])
