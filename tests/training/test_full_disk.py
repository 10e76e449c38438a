"""A disk without room ends a run in one line; once there is room, the same command continues it."""

import errno
import json
import os
import re
import subprocess

import pytest

from prism_deco.exits import CheckpointFailed, DiskFull
from prism_deco.training.checkpoints import newest_checkpoint
from prism_deco.training.progress import read_metrics
from prism_deco.training.run_dir import full_disk_named

OPTIONS = ["trainer.checkpoint_every=2", "recipe.epochs=4", "projector=avgpool"]


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 MB, which `fill` leaves without a byte and `free` empties again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk):
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                pass


def _free(disk):
    (disk / "filler").unlink()


def _strays(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".building")]


needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")


@needs_mount
def test_a_disk_that_is_full_from_the_start(start, disk):
    _fill(disk)
    job = start(*OPTIONS, f"runs_dir={disk}")
    assert job.wait() in ([1], [2])
    said = job.log.read_text()
    assert "Traceback" not in said and "Logging error" not in said
    last = said.splitlines()[-1]
    assert f"{disk}/run: No space left on device (0.0 MB free)" in last and "run the same command" in last
    _free(disk)
    assert start(*OPTIONS, f"runs_dir={disk}").wait() == [0]


@needs_mount
def test_a_disk_that_becomes_full_on_the_way(start, disk, tmp_path):
    """Whatever is written next: a line of metrics, of TensorBoard, of the log, a checkpoint."""
    whole = start(*OPTIONS, run="whole")
    job = start(*OPTIONS, "recipe.epochs=4", f"runs_dir={disk}")
    job.folder = disk / "run"
    job.until(lambda folder: newest_checkpoint(folder / "checkpoints"))
    _fill(disk)
    assert job.wait() == [1], job.log.read_text()
    said = job.log.read_text()
    assert "Traceback" not in said and "Logging error" not in said and "Exception in thread" not in said
    status = json.loads((disk / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "No space left on device" in status["reason"]
    assert str(disk / "run") in status["reason"]
    assert re.search(r"it needs \d+\.\d MB|Free \d+\.\d MB for the next checkpoint", status["reason"])
    assert _strays(disk) == []
    assert said.splitlines()[-1].startswith("prism-deco: failed: ")
    assert said.splitlines()[-1].endswith("run the same command to continue")
    _free(disk)
    job = start(*OPTIONS, f"runs_dir={disk}")
    assert job.wait() == [0], job.log.read_text()
    assert whole.wait() == [0]
    assert read_metrics(disk / "run") == read_metrics(tmp_path / "whole")


FULL = """
import resource, sys
from prism_deco.training import {module}
_do = {module}.{function}
def limited(*args, **kwargs):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    return _do(*args, **kwargs)
{module}.{function} = limited
"""


@pytest.mark.parametrize(
    ("module", "function", "limit"),
    [("checkpoint_callback", "save_checkpoint", 20_000), ("trainer", "save_model", 20_000)],
)
def test_whichever_file_does_not_fit(start, tmp_path, module, function, limit):
    """By a limit on the size of files, as a quota has it: a checkpoint, the weights of the model."""
    (tmp_path / "full.py").write_text(FULL.format(module=module, function=function, limit=limit))
    job = start(*OPTIONS, "plugins=[full]", PLUGINS=str(tmp_path))
    assert job.wait() == [1], job.log.read_text()
    said = job.log.read_text()
    assert "Traceback" not in said and "File too large" in said.splitlines()[-1]
    assert str(tmp_path / "run") in said.splitlines()[-1] and "MB" in said.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert _strays(tmp_path / "run") == []
    (tmp_path / "full.py").write_text("")
    assert start(*OPTIONS, "plugins=[full]", PLUGINS=str(tmp_path)).wait() == [0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskFull),
        (CheckpointFailed("step_000002 could not be written (OSError: No space left on device)"), CheckpointFailed),
    ],
)
def test_the_reason_is_told_once(tmp_path, error, kind):
    """A run names the disk where it trains, and again around all of it."""
    with pytest.raises(kind) as found, full_disk_named(tmp_path), full_disk_named(tmp_path):
        raise error
    assert str(found.value).count("No space left on device") == 1 and str(found.value).count("MB free") <= 1
