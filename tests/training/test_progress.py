"""What a person sees of a run: a bar that knows where the run stands, and lines in a log."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from prism_deco.cli import main
from prism_deco.training import callbacks
from prism_deco.training.progress import read_metrics


@pytest.fixture
def arguments(colors, tmp_path):
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    return ["train", "data=llava", *source, "data.val_fraction=0.3", "trainer.val_every=0.3", "trainer=cpu",
            "evaluate.benchmarks=null", "recipe.global_batch_size=2", "trainer.threads=1", "trainer.samples=0",
            "recipe.epochs=4", "run_id=run"]  # fmt: skip


def test_a_log_in_a_file_shows_how_far_the_run_is(arguments, tmp_path, monkeypatch):
    """Every two minutes; here one passes with each look at the clock."""
    clock = iter(range(0, 10_000, 61))
    monkeypatch.setattr(callbacks, "monotonic", lambda: next(clock))
    assert main(arguments) == 0
    rows = read_metrics(tmp_path / "run")
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    text = (tmp_path / "run" / "train.log").read_text()
    total = max(losses)
    found = re.findall(r"Step (\d+) of (\d+): loss ([\d.]+), ([\d.]+) s per step, ([\d:]+) left", text)
    assert [int(step) for step, *_ in found] == list(range(2, total + 1, 2))
    for step, of, loss, seconds, left in found:
        assert int(of) == total and float(loss) == pytest.approx(losses[int(step)], abs=1e-4)
        hours, minutes, rest = map(int, left.split(":"))
        assert float(seconds) == 61.0 and 3600 * hours + 60 * minutes + rest == 61 * (total - int(step))
    values = [(row["step"], f"{row['val/loss']:.4f}") for row in rows if "val/loss" in row]
    assert [(int(s), v) for s, v in re.findall(r"Step (\d+) of \d+: val/loss ([\d.]+)", text)] == values != []


STOPS = """
import os
from prism_deco.training.module import TrainingModule
_step = TrainingModule.training_step
def step(self, batch, index):
    if "STOP" in os.environ and self.trainer.global_step == 7:
        raise RuntimeError("a plug-in stopped it")
    return _step(self, batch, index)
TrainingModule.training_step = step
"""


@pytest.mark.slow
def test_on_a_terminal_the_bar_goes_on_where_the_run_does(arguments, tmp_path):
    """And no line of the log sticks to it."""
    (tmp_path / "stops.py").write_text(STOPS)
    command = [sys.executable, "-m", "prism_deco.cli", *arguments, "trainer.checkpoint_every=5", "plugins=[stops]"]
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    code, screen = _in_terminal(command, 80, {"PYTHONPATH": path, "STOP": "1"})
    assert code == 1 and "a plug-in stopped it" in screen
    code, screen = _in_terminal(command, 80, {"PYTHONPATH": path})
    assert code == 0, screen
    total = max(row["step"] for row in read_metrics(tmp_path / "run"))
    bars = [(int(step), int(of)) for step, of in re.findall(r"Training [^\n]*?(\d+)/(\d+)", screen)]
    assert bars[0] == (5, total) and bars[-1] == (total, total)
    saved = [line for line in screen.splitlines() if "Saving step_" in line]
    assert saved and all(re.match(r"[\d: ]+ INFO +Saving step_\d+ *$", line) for line in saved), saved


def _in_terminal(command, width, environment):
    """(exit code, what was shown, without colours and movements) of a command in a pseudo-terminal of that width."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"} | environment
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the last process that had the other end has closed it
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    text = shown.decode(errors="replace")
    return process.wait(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
