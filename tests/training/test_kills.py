"""A run is killed before one of its file operations and started again: every file must be as if nothing had been."""

import json
import shutil
from pathlib import Path

import pytest

OPTIONS = ["trainer.checkpoint_every=2", "trainer.keep_checkpoints=1", "recipe.epochs=2", "data.val_fraction=0.3",
           "trainer.val_every=0.5", "trainer.samples=1", "plugins=[killer]"]  # fmt: skip

KILLER = '''
"""Kills its process before the file operation KILL_AT in the run's folder, counted among those that match KILL."""
import os, signal, sys
from pathlib import Path

counted = 0
def before(event, args):
    global counted
    if event == "open":
        path, writes = args[0], args[2] & (os.O_WRONLY | os.O_RDWR)
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        path, writes = args[0], True
    else:
        return
    if not writes or not isinstance(path, (str, Path)) or os.environ["KILL_FOLDER"] not in str(path):
        return
    operation = f"{event} {path}"
    if os.environ["KILL"] in operation:
        counted += 1
        if counted == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        with open(os.environ["KILL_TRACE"], "a") as file:
            file.write(operation + "\\n")
sys.addaudithook(before)

if os.environ["KILL"] == "torn":
    def open_and_die(self, *args, **kwargs):
        file = _open(self, *args, **kwargs)
        if "config.yaml" in self.name and file.writable():
            os.kill(os.getpid(), signal.SIGKILL)
        return file
    _open, Path.open = Path.open, open_and_die
'''


@pytest.fixture
def attempt(start, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)

    def begin(kill: str = "", at: int = 0):
        job = start(*OPTIONS, PLUGINS=str(tmp_path), KILL=kill, KILL_AT=str(at), KILL_FOLDER=str(tmp_path / "run"),
                    KILL_TRACE=str(tmp_path / "trace"))  # fmt: skip
        return job.wait()[0], job.log

    return begin


def _files(run: Path) -> dict[str, bytes]:
    """The content of all files but the log, TensorBoard's and the status, which hold times and process numbers."""
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    paths = [path for path in sorted(run.rglob("*")) if path.is_file()]
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}
    return {name: files[name] for name in files if not name.startswith(("tensorboard/", "train.log", "status.json"))}


@pytest.fixture
def whole(attempt, tmp_path):
    """The files of a run that is not interrupted, and its file operations."""
    code, log = attempt()
    assert code == 0, log.read_text()
    files = _files(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    return files, (tmp_path / "trace").read_text().splitlines()


def test_after_kills_every_file_is_the_same(attempt, whole, tmp_path):
    """While config.yaml is written, between the last step and its validation, before the checkpoint that the last one
    replaces is removed, and while the model is written."""
    files, operations = whole
    named = max(k for k, text in enumerate(operations) if text.endswith("checkpoints/.building-step_000004"))
    lines_before = sum("/metrics.jsonl" in text for text in operations[:named])
    assert attempt("torn")[0] == -9
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert attempt("/metrics.jsonl", at=lines_before + 1)[0] == -9
    assert (tmp_path / "run/checkpoints/step_000004").is_dir(), "the last checkpoint has its name"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/loss" in row] == [2], "and its validation is not recorded"
    first = tmp_path / "run/checkpoints/step_000002"
    assert attempt(f"os.rename {first}", at=1)[0] == -9
    assert first.is_dir(), "it was to be removed"
    assert attempt("model/tokenizer", at=2)[0] == -9
    code, log = attempt()
    assert code == 0, log.read_text()
    assert _files(tmp_path / "run") == files


@pytest.mark.slow
@pytest.mark.parametrize("offset", range(1, 4))
def test_whichever_operation_it_is_killed_before(attempt, whole, tmp_path, offset):
    files, operations = whole
    for number in range(offset, len(operations) + 1, 3):
        assert attempt(at=number)[0] == -9, number
        code, log = attempt()
        assert code == 0, log.read_text()
        assert _files(tmp_path / "run") == files, operations[number - 1]
        shutil.rmtree(tmp_path / "run")
