"""An export to a disk that is too small: one line that says what it needs, and nothing left behind."""

import multiprocessing
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
import torch

from prism_deco.api import Model
from prism_deco.cli import main

LIMIT = 2**20


@contextmanager
def small_disk(place: Path, size: int):
    """(folder, limit on the size of files): a file system of `size` bytes, or, where none may be mounted, the limit."""
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True
        ).returncode
    )
    try:
        yield place, None if mounted else size
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def run_command(arguments: list[str], size: int | None, log: Path) -> None:
    torch.set_num_threads(1)  # libgomp's threads do not survive a fork
    if size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with log.open("w") as stream, redirect_stderr(stream):
        code = main(arguments)
    sys.exit(code)


def export(*arguments: str, log: Path, size: int | None) -> tuple[int | None, str]:
    """Exit code and output of the command in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=run_command, args=(["export", *arguments], size, log))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


@pytest.fixture
def exported(random_model, tmp_path):
    config, vlm, llm = random_model("clip", "llm=mini_qwen2")
    Model(vlm, llm, config).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("form", [[], ["--hf"], ["--dtype", "bfloat16"]], ids=str)
@pytest.mark.parametrize("exists", [False, True])
def test_the_need_is_named_and_nothing_is_left(exported, tmp_path, form, exists):
    log = tmp_path / "log"
    with small_disk(tmp_path / "small", LIMIT) as (disk, size):
        target = disk / "export"
        if exists:
            target.mkdir()
        code, said = export(str(exported), "--to", str(target), *form, log=log, size=size)
        assert code == 2 and "Traceback" not in said
        line = said[said.index("error:") :]
        line = " ".join(line.split())
        assert str(target) in line and re.search(r"needs about \d+\.\d MB", line)
        assert target.exists() == exists and not any(path for path in disk.rglob("*") if path != target)
        # The way out: the same command for a disk with room.
        code, said = export(str(exported), "--to", str(tmp_path / "elsewhere"), *form, log=log, size=None)
        assert code == 0, said


@pytest.mark.parametrize("form", [[], ["--hf"]], ids=str)
def test_a_limit_that_no_one_can_foresee(exported, tmp_path, form):
    """A quota shows when the files are written, not before."""
    target = tmp_path / "export"
    code, said = export(str(exported), "--to", str(target), *form, log=tmp_path / "log", size=LIMIT)
    assert code == 2 and "Traceback" not in said
    assert str(target) in said[said.index("error:") :] and not target.exists()
