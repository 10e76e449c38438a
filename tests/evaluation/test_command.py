"""`prism-deco evaluate` on a real run, alone and under torchrun."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from prism_deco.cli import main

FAST = ["data.val_fraction=0", "data.num_workers=0", "recipe.max_steps=2", "recipe.global_batch_size=2",
        "recipe.micro_batch_size=2", "trainer.threads=1", "backbone.pretrained=false",
        "evaluate.benchmarks=null"]  # fmt: skip


@pytest.fixture
def run(colors, tmp_path) -> Path:
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    assert main(["train", "data=llava", *source, *FAST, f"runs_dir={tmp_path}", "run_id=run"]) == 0
    return tmp_path / "run"


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run, files, tmp_path):
    """A benchmark of the user's own, half precision included in what is recorded."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({k: v for k, v in files.vqav2().items() if k != "name"}))
    arguments = [f"benchmark={mine}", "max_new_tokens=4", "--dtype=bfloat16"]
    assert main(["evaluate", str(run), *arguments]) == 0
    alone = {path.name: path.read_bytes() for path in (run / "eval/mine").iterdir()}
    assert set(alone) == {"decoding.json", "metrics.json", "predictions.jsonl"}
    decoding = json.loads(alone["metrics.json"])["decoding"]
    assert (decoding["dtype"], decoding["max_new_tokens"]) == ("bfloat16", 4)
    (run / "eval").rename(tmp_path / "alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "prism_deco.cli", "evaluate", str(run), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (run / "eval/mine").iterdir()} == alone
    assert done.stdout.count("│ mine") == 1, "one of the processes prints"
    assert done.stderr.count("questions, 0 of them already answered") == 2


@pytest.mark.slow
def test_another_precision_is_not_mixed_in(run, files, tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({k: v for k, v in files.gqa().items() if k != "name"}))
    assert main(["evaluate", str(run), f"benchmark={mine}", "max_new_tokens=4"]) == 0
    assert main(["evaluate", str(run), f"benchmark={mine}", "max_new_tokens=4", "--dtype=bfloat16"]) == 2
    assert "choose another folder" in " ".join(capsys.readouterr().err.split())


@contextmanager
def _another_process():
    yield False


def test_training_ends_with_the_relevance_maps_of_a_benchmark(colors, files, tmp_path, monkeypatch):
    boxes = tmp_path / "boxes.yaml"
    boxes.write_text(yaml.safe_dump({k: v for k, v in files.refcoco().items() if k != "name"}))
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    asked = [f"evaluate.relevance={boxes}", "evaluate.relevance_limit=3", "run_id=measured"]
    assert main(["train", "data=llava", *source, *FAST, *asked]) == 0
    folder = tmp_path / "measured/explain"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["n"], metrics["benchmark"], metrics["split"]) == (3, "boxes", "val")
    assert len((folder / "examples.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "measured/eval").exists(), "no benchmark was to be scored"
    monkeypatch.setattr("prism_deco.evaluation.process_group", _another_process)
    assert main(["train", "data=llava", *source, *FAST, *asked, "run_id=other"]) == 0
    assert not (tmp_path / "other/explain").exists(), "the first process alone measures"
