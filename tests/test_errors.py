"""Refused input is one line wherever it was found, and only refused input is."""

import errno
import json
import os

import pytest
from torch.utils.data import DataLoader, Dataset

from prism_deco.cli import main
from prism_deco.errors import UsageError


class Refusing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


def test_what_a_loader_process_refuses_is_said_without_its_traceback():
    with pytest.raises(UsageError) as raised:
        next(iter(DataLoader(Refusing(UsageError("Record 7: no image.\nFix it.")), num_workers=1)))
    assert str(raised.value) == "Record 7: no image.\nFix it."
    with pytest.raises(ValueError, match="Original Traceback"):
        next(iter(DataLoader(Refusing(ValueError("a bug")), num_workers=1)))


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), KeyError("a bug")])
def test_a_bug_is_not_taken_for_refused_input(monkeypatch, capsys, error):
    def broken(args):
        raise error

    def refusing(args):
        raise UsageError("no such\nfile")

    monkeypatch.setattr("prism_deco.commands.keys.keys", broken)
    with pytest.raises(type(error)) as raised:
        main(["keys"])
    assert raised.value is error
    monkeypatch.setattr("prism_deco.commands.keys.keys", refusing)
    assert main(["keys"]) == 2 and capsys.readouterr().err == "prism-deco: error: no such file\n"
    with pytest.raises(UsageError):
        main(["keys", "--debug"])


@pytest.mark.parametrize("reason", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_is_one_line(monkeypatch, capsys, reason):
    """A write to a full disk names no file: the message names the fullest of the folders in use."""
    number = getattr(errno, reason)

    def refused(args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("prism_deco.commands.keys.keys", refused)
    assert main(["keys", "x" * 5000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prism-deco: error: ") and f": {os.strerror(number)} (" in line and "--out" in line
    with pytest.raises(OSError, match="."):
        main(["keys", "--debug"])


PLUGIN = """
from prism_deco.evaluation import BENCHMARKS
from prism_deco.evaluation.gqa import GQA

@BENCHMARKS.register("{name}")
class Careless(GQA):
    def grade(self, prediction):
        return open({path!r}, "w")
"""


@pytest.mark.parametrize("path", ["/dev/null/x", "/", "x" * 300])
def test_a_plug_in_s_own_files_are_its_bug(tmp_path, monkeypatch, path):
    """Whatever the system refuses: only what the user named is his to fix."""
    name = f"careless_{len(path)}"  # one that was imported is not imported again
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name, path=path))
    (tmp_path / "mine.yaml").write_text(f"{{family: {name}, root: null, image: x, annotations: x, variants: [short]}}")
    answer = {"question_id": "1", "image": "x", "prompt": "?", "output": "a", "answer": None, "score": 0.0}
    (tmp_path / "p.jsonl").write_text(json.dumps(answer | {"target": {"answer": "a"}}) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    chosen = [f"benchmark={tmp_path / 'mine.yaml'}", f"plugins=[{name}]"]
    with pytest.raises(OSError, match="Errno") as caught:
        main(["evaluate", "--score-only", str(tmp_path / "p.jsonl"), *chosen])
    assert caught.traceback[-1].path.name == f"{name}.py"


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", LONG, "benchmark=mini"],
        ["evaluate", "--score-only", LONG, "benchmark=mini_pope"],
        ["evaluate", "--score-only", "/", "benchmark=mini_pope"],
        ["explain", LONG, "benchmark=mini_refcoco"],
        ["chat", LONG],
        ["export", LONG, "--to=x"],
        ["export", "runs", f"--to={LONG}"],
        ["report", LONG, "--out=x"],
        ["train", f"{LONG}.yaml"],
        ["train", f"data={LONG}"],
        ["train", f"runs_dir={LONG}"],
        ["data", "check", "data=llava", f"data.json={LONG}", "data.image_root=."],
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "LONG"),
)
def test_what_the_system_refuses_of_the_user_s_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("prism-deco: error: ") and ("name too long" in line or "Is a directory" in line)


def test_a_file_that_is_missing_is_a_bug(monkeypatch):
    def missing(args):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x.json")

    monkeypatch.setattr("prism_deco.commands.keys.keys", missing)
    with pytest.raises(FileNotFoundError):
        main(["keys"])
