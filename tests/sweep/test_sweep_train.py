"""The command `sweep` with the real `train`: what kills leave is taken up, and the scores are the same."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prism_deco.cli import main
from prism_deco.sweep import Ledger, expand, parse
from prism_deco.sweep.ledger import lock

ROOT = Path(__file__).parents[2]
TINY = [
    "projector=avgpool,maxpool", "data.train_images=60", "data.val_images=24", "data.test_images=8",
    "data.val_items=12", "data.test_items=8", "evaluate.benchmarks=mini_pope,mini_gqa", "trainer.threads=1",
    "trainer.checkpoint_every=2", "name=tiny", "--jobs", "2",
]  # fmt: skip


def _start(runs: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "prism_deco.cli", "sweep", *TINY, f"runs_dir={runs}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _scores(sweep: Path) -> dict[str, object]:
    """Everything measured: weights, metrics and answers."""
    found: dict[str, object] = {}
    for cell in ("avgpool", "maxpool"):
        found[cell] = json.loads((sweep / cell / "manifest.json").read_text())["model_sha256"]
        for benchmark in ("mini_pope", "mini_gqa"):
            folder = sweep / cell / "eval" / benchmark
            metrics = json.loads((folder / "metrics.json").read_text())
            found[f"{cell}/{benchmark}"] = {key: metrics[key] for key in ("metrics", "interval95", "n", "data_hash")}
            found[f"{cell}/{benchmark}/answers"] = (folder / "predictions.jsonl").read_text()
    return found


def _until(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_scores_of_an_undisturbed_one(tmp_path):
    assert _start(tmp_path / "calm").wait(300) == 0
    seed = time.time_ns()
    choose, sweep = random.Random(seed), tmp_path / "wild" / "tiny"
    process = _start(tmp_path / "wild")
    steps = choose.randrange(1, 6)
    _until(lambda: _steps(sweep / "avgpool") >= steps)
    psutil.Process(json.loads((sweep / "avgpool" / "status.json").read_text())["pid"]).kill()
    _until(lambda: Ledger.read(sweep).entries["avgpool"].state == "failed")
    assert "SIGKILL" in str(Ledger.read(sweep).entries["avgpool"].reason)
    assert Ledger.read(sweep).entries["maxpool"].state in ("running", "done")  # it was not touched
    time.sleep(choose.uniform(0, 3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _start(tmp_path / "wild").wait(300) == 0
    assert Ledger.read(sweep).entries["avgpool"].attempts == 2
    assert _scores(sweep) == _scores(tmp_path / "calm" / "tiny"), f"seed {seed}"


def test_the_command_shows_what_it_would_do_and_what_was_done(tmp_path, capsys):
    arguments = ["sweep", "mini", "row=M1", f"runs_dir={tmp_path}"]
    assert main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("#")] == ["M1-c_abstractor,", "M1-avgpool,"]
    assert lines[1].endswith(f"projector=c_abstractor runs_dir={tmp_path / 'mini'} run_id=M1-c_abstractor")
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--status"]) == 2
    assert "is not a sweep folder" in capsys.readouterr().err
    with lock(tmp_path / "mini"):
        Ledger.merge(tmp_path / "mini", "mini", expand(parse(arguments[1:]))).write()
        assert main(arguments) == 2
    assert "is being run by process" in capsys.readouterr().err
    assert main([*arguments, "--status"]) == 0
    shown = capsys.readouterr().out
    assert "mini: 2 planned" in shown and "M1-avgpool" in shown
