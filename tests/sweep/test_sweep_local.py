"""Where a local cell runs: its GPUs, its threads, its environment."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_sweep import command

from prism_deco.config import load_config
from prism_deco.sweep import driver
from prism_deco.sweep.driver import Driver
from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.launchers import LocalLauncher, visible_gpus
from prism_deco.sweep.ledger import Ledger, LedgerEntry


def _cells(number: int, *settings: str) -> list[SweepCell]:
    return [SweepCell(f"{i}-environment", {}, (), load_config(settings)) for i in range(number)]


def _environments(folder, cells, **options) -> tuple[list[dict[str, str]], LocalLauncher]:
    folder.mkdir()
    launcher = LocalLauncher(folder, cells, command=command, **options)
    assert Driver(Ledger.merge(folder, "s", cells), cells, launcher, timeout=None).run()
    return [json.loads((folder / cell.id / "environment0.json").read_text()) for cell in cells], launcher


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(driver, "POLL", 0.05)


def test_cells_side_by_side_have_gpus_of_their_own(tmp_path):
    cells = _cells(3, "trainer=gpu", "trainer.devices=2")
    found, launcher = _environments(tmp_path / "sweep", cells, gpus=["0", "1", "2", "3", "4"])
    assert launcher.jobs == 2
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in found[:2]} == {"0,1", "2,3"}
    assert len(found[2]["CUDA_VISIBLE_DEVICES"]) == 3
    assert launcher.free == launcher.gpus


def test_the_environment_tells_a_cell_nothing_of_its_surroundings(tmp_path, monkeypatch):
    foreign = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "SUBMITIT_EXECUTOR", "PL_GLOBAL_SEED")
    for name in foreign:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "/kept")
    (found,), _ = _environments(tmp_path / "sweep", _cells(1), gpus=[])
    assert not set(foreign) & set(found)
    assert found["HF_HOME"] == "/kept"
    assert "CUDA_VISIBLE_DEVICES" not in found or found["CUDA_VISIBLE_DEVICES"] == os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    ("cores", "jobs", "own", "settings", "threads"),
    [
        (8, 2, None, [], "4"),
        (8, 2, "2", [], "2"),
        (8, 2, None, ["trainer.threads=1"], "1"),
        (8, 2, None, ["trainer.devices=2"], "2"),
        (1, 2, None, [], "1"),
    ],
)
def test_cells_share_the_cores(tmp_path, monkeypatch, cores, jobs, own, settings, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    (cell,) = _cells(1, *settings)
    launcher = LocalLauncher(tmp_path, [cell], jobs=jobs, gpus=[])
    line = launcher.describe(cell, LedgerEntry("a", {}, ["seed=1"], adjusted=["recipe.micro_batch_size=8"]))
    place = f"trainer.preflight=true seed=1 recipe.micro_batch_size=8 runs_dir={tmp_path} run_id=a"
    assert line == f"OMP_NUM_THREADS={threads} {sys.executable} -m prism_deco.cli train {place}"


def test_a_cell_that_cannot_fit_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"Cell 0-environment asks for 3 GPUs, this machine shows 2"):
        LocalLauncher(tmp_path, _cells(1, "trainer=gpu", "trainer.devices=3"), gpus=["0", "1"])
    with pytest.raises(ValueError, match=r"asks for 2 nodes: use launcher=slurm"):
        LocalLauncher(tmp_path, _cells(1, "trainer.num_nodes=2"), gpus=[])
    assert LocalLauncher(tmp_path, _cells(1, "trainer=ddp"), gpus=["0", "1"]).jobs == 1  # all GPUs for each


def test_gpus_are_those_that_this_process_may_see(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$*" = "--query-gpu=index --format=csv,noheader" ] && printf "0\\n1\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a")
    assert visible_gpus() == ["3", "GPU-8a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_slurm_job_of_an_earlier_driver_is_not_run_beside_it(tmp_path):
    (cell,) = _cells(1)
    with pytest.raises(ValueError, match=r"runs as SLURM job 12: use launcher=slurm, or scancel"):
        LocalLauncher(tmp_path, [cell], gpus=[]).attach(cell, LedgerEntry(cell.id, {}, [], job="12"))
