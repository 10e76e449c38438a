"""The cache: where it is, and that several users can share one."""

import ctypes
import json
import os
import pwd
import subprocess
import sys

import pytest
import torch

from prism_deco.config import cache_dir
from prism_deco.data.records import open_records
from prism_deco.llms import build_llm
from prism_deco.llms.weights import as_safetensors
from prism_deco.miniature.world import shapes_captions


def test_the_cache_is_never_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PRISM_DECO_CACHE", "")
    assert cache_dir() == tmp_path / "prism_deco"
    monkeypatch.setenv("PRISM_DECO_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PRISM_DECO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home/.cache/prism_deco"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "PRISM_DECO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)  # a container under a number that has no name
    with pytest.raises(ValueError, match="no home directory: set PRISM_DECO_CACHE to a folder"):
        cache_dir()


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A cache of everything that is cached: an index, a miniature world, its captions, converted weights."""
    monkeypatch.setenv("PRISM_DECO_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o022)
    try:
        turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
        open_records(tmp_path / "train.json", cache_dir())
        shapes_captions(train_images=4, val_images=2, test_images=2, val_items=1, test_items=1)
        llm = build_llm("mini_qwen2", pretrained=False).model
        (tmp_path / "llm").mkdir()
        llm.config.save_pretrained(tmp_path / "llm")
        torch.save(llm.state_dict(), tmp_path / "llm/pytorch_model.bin")
        as_safetensors(tmp_path / "llm")
    finally:
        os.umask(before)
    return tmp_path / "cache"


def test_others_may_read_what_one_user_has_cached(shared):
    entries = [path for path in shared.rglob("*") if path.name != "converting.lock"]
    assert {path.name for path in shared.iterdir()} >= {"index", "converted"}
    assert any(path.suffix == ".safetensors" for path in entries)
    for path in entries:
        wanted = 0o055 if path.is_dir() else 0o044
        assert path.stat().st_mode & wanted == wanted, path
    assert not list(shared.rglob(".building-*"))


def _without_override() -> None:
    """Root obeys the modes of files from here on, as other users do."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2, 3):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "prctl")


READER = """
import json, sys
from pathlib import Path
from prism_deco.config import cache_dir
from prism_deco.data.records import open_records
from prism_deco.llms.weights import as_safetensors
from prism_deco.miniature.world import shapes_captions
folder = Path(sys.argv[1])
assert len(open_records(folder / "train.json", cache_dir())) == 1
assert shapes_captions(train_images=4, val_images=2, test_images=2, val_items=1, test_items=1).train.is_file()
assert as_safetensors(folder / "llm").is_dir()
(folder / "other.json").write_text((folder / "train.json").read_text() + " ")
try:
    open_records(folder / "other.json", cache_dir())
except ValueError as error:
    print(error)
"""


def test_a_cache_that_one_may_not_write_is_read(shared):
    for path in [shared, *shared.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READER, str(shared.parent)],
            capture_output=True,
            text=True,
            preexec_fn=_without_override if os.geteuid() == 0 else None,
        )
    finally:
        for path in [shared, *shared.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    assert done.returncode == 0, done.stderr
    assert f"{shared}/index cannot be written (Permission denied): set PRISM_DECO_CACHE" in done.stdout
