"""Refused input is one line wherever it was found, and only refused input is."""

import errno
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


@pytest.mark.parametrize(
    "reason", ["EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "EISDIR", "ENAMETOOLONG", "ENOSPC", "EDQUOT"]
)
def test_a_file_that_the_system_refuses_is_one_line(monkeypatch, capsys, tmp_path, reason):
    number = getattr(errno, reason)
    # A write to a full disk names no file: the message names the fullest of the folders in use.
    name = () if reason in ("ENOSPC", "EDQUOT") else ("results/x.json",)

    def refused(args):
        raise OSError(number, os.strerror(number), *name)

    monkeypatch.setattr("prism_deco.commands.keys.keys", refused)
    assert main(["keys", "x" * 5000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prism-deco: error: ") and f": {os.strerror(number)}" in line and "--out" in line
    assert not name or f"error: {name[0]}:" in line
    with pytest.raises(OSError, match="."):
        main(["keys", "--debug"])


def test_a_file_that_is_missing_is_a_bug(monkeypatch):
    def missing(args):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x.json")

    monkeypatch.setattr("prism_deco.commands.keys.keys", missing)
    with pytest.raises(FileNotFoundError):
        main(["keys"])
