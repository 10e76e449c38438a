"""Cells as jobs of a stand-in cluster, submitted by the real submitit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fake_slurm
from fake_sweep import cells_of, command

from prism_deco.config import load_config
from prism_deco.sweep import driver, expand, parse
from prism_deco.sweep.driver import Driver
from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.ledger import Ledger, LedgerEntry
from prism_deco.sweep.slurm import SlurmJob, SlurmLauncher

submitit = pytest.importorskip("submitit")
ROOT = Path(__file__).parents[2]
DRIVE = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_sweep_slurm import drive
from fake_sweep import cells_of
drive(Path(sys.argv[1]), cells_of(sys.argv[2:]))
"""


def drive(folder: Path, cells: list[SweepCell], **options) -> Ledger:
    folder.mkdir(exist_ok=True)
    ledger = Ledger.merge(folder, folder.name, cells)
    launcher = SlurmLauncher(folder, folder.name, cells, {"time": 10}, command=command, **options)
    Driver(ledger, cells, launcher, timeout=None).run()
    return ledger


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    fake_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(driver, "POLL", 0.1)
    monkeypatch.setattr("prism_deco.sweep.slurm.CHECK_EVERY", 1.0)
    # The watcher belongs to the process and keeps the ends it has seen, but each of these clusters begins with job 1.
    watcher = type(submitit.SlurmJob.watcher)(delay_s=600)
    monkeypatch.setattr(submitit.SlurmJob, "watcher", watcher)
    return tmp_path


def _wait_until_nothing_is_left(folder: Path) -> None:
    end = time.monotonic() + 60
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def _start(folder: Path, behaviour: str) -> subprocess.Popen:
    """A driver of its own, with one cell that has begun."""
    code = DRIVE.format(here=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), behaviour], cwd=ROOT)
    end = time.monotonic() + 120
    while not (folder / f"0-{behaviour}" / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


def test_jobs_end_as_local_cells_do(cluster):
    ledger = drive(cluster / "sweep", cells_of(["well", "crash", "hungry", "preempted_once"]))
    entries = {name.partition("-")[2]: entry for name, entry in ledger.entries.items()}
    assert {name: (entry.state, entry.attempts) for name, entry in entries.items()} == {
        "well": ("done", 1), "crash": ("failed", 1), "hungry": ("done", 2), "preempted_once": ("done", 2),
    }  # fmt: skip
    assert entries["crash"].reason == "exit code 1: last words"
    assert all(entry.job is None for entry in entries.values())
    _wait_until_nothing_is_left(cluster)


def test_each_device_is_a_task_that_knows_its_rank_and_not_submitit(cluster):
    config = load_config(["trainer.devices=2", "trainer.num_nodes=1", "trainer.threads=3"])
    (entry,) = drive(cluster / "sweep", [SweepCell("0-environment", {}, (), config)]).entries.values()
    assert entry.state == "done"
    found = [json.loads((cluster / "sweep" / entry.id / f"environment{rank}.json").read_text()) for rank in (0, 1)]
    assert [(f["SLURM_NTASKS"], f["SLURM_PROCID"], f["SLURM_LOCALID"]) for f in found] == [
        ("2", "0", "0"), ("2", "1", "1"),
    ]  # fmt: skip
    assert not [name for environment in found for name in environment if name.startswith("SUBMITIT_")]


class Ended:
    """A job that SLURM says has ended."""

    job_id = "7"

    def __init__(self, state: str):
        self.state = state

    def done(self) -> bool:
        return True

    def get_info(self, mode: str) -> dict[str, str]:
        return {"State": self.state}


def test_exit_codes_that_a_shared_file_system_shows_late_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("prism_deco.sweep.slurm.CHECK_EVERY", 0.3)
    late, never = SlurmJob(Ended("COMPLETED"), tmp_path / "late"), SlurmJob(Ended("COMPLETED"), tmp_path / "never")
    assert (late.poll(), never.poll()) == (None, None)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "7_0.code").write_text("75")
    assert (late.poll(), late.ended) == (75, True)
    time.sleep(0.4)
    assert (never.poll(), never.ended) == (1, True)


@pytest.mark.parametrize(
    ("state", "code"), [("TIMEOUT", 75), ("NODE_FAIL", 75), ("OUT_OF_MEMORY", 76), ("CANCELLED by 0", 1), ("FAILED", 1)]
)
def test_a_job_that_left_no_exit_code_ended_as_slurm_says(tmp_path, state, code):
    assert SlurmJob(Ended(state), tmp_path).poll() == code


@pytest.mark.slow
def test_a_rank_that_crashes_ends_its_job(cluster):
    config = load_config(["trainer.devices=2"])
    (entry,) = drive(cluster / "sweep", [SweepCell("0-unequal", {}, (), config)]).entries.values()
    assert entry.state == "failed"
    _wait_until_nothing_is_left(cluster)


@pytest.mark.slow
def test_jobs_outlive_a_killed_driver_and_the_next_one_finds_them(cluster):
    process = _start(cluster / "sweep", "steady")
    process.kill()
    process.wait()
    assert Ledger.read(cluster / "sweep").entries["0-steady"].job == "1"
    (entry,) = drive(cluster / "sweep", cells_of(["steady"])).entries.values()
    assert (entry.state, entry.attempts) == ("done", 1)
    assert len((cluster / "sweep" / "0-steady" / "starts").read_text().splitlines()) == 1


@pytest.mark.slow
def test_an_interrupted_sweep_lets_its_jobs_save(cluster):
    process = _start(cluster / "sweep", "slow")
    process.send_signal(signal.SIGINT)
    process.wait(120)
    entry = Ledger.read(cluster / "sweep").entries["0-slow"]
    assert (entry.state, entry.reason) == ("preempted", "stopped with the sweep")
    assert json.loads((cluster / "sweep" / "0-slow" / "status.json").read_text())["state"] == "preempted"
    _wait_until_nothing_is_left(cluster)


def test_the_script_asks_for_what_the_cell_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no cluster
    settings = ["mini", "row=M1", "projector=avgpool", "trainer=gpu", "trainer.devices=4", "trainer.num_nodes=2"]
    (cell,) = expand(parse([*settings, "data.num_workers=3", "trainer.threads=2"]))
    parameters = {"partition": "gpu", "time": 90, "account": "lab"}
    launcher = SlurmLauncher(tmp_path, "mini", [cell], parameters, dry=True)
    script = launcher.describe(cell, LedgerEntry(cell.id, {}, list(cell.overrides)))
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.M))
    expected = {
        "job-name": "mini-M1-avgpool", "partition": "gpu", "account": "lab", "time": "90", "nodes": "2",
        "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "5", "signal": "USR2@300",
    }  # fmt: skip
    assert expected.items() <= options.items()
    assert "wckey" not in options
    keyed = SlurmLauncher(tmp_path, "mini", [cell], {"wckey": "vision"}, dry=True)
    assert "#SBATCH --wckey=vision\n" in keyed.describe(cell, LedgerEntry(cell.id, {}, list(cell.overrides)))
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1" in srun and "submitit.core._submit" in srun
    assert script.splitlines()[-1].endswith(f"projector=avgpool runs_dir={tmp_path} run_id=M1-avgpool")
    with pytest.raises(ValueError, match=r"srun.*--dry-run shows the jobs"):
        SlurmLauncher(tmp_path, "mini", [cell], {})


@pytest.mark.parametrize(
    ("settings", "parameters", "message"),
    [
        ([], {"nodes": 2}, r"slurm\.nodes follows from trainer\.num_nodes"),
        ([], {"gpus_per_node": 2}, r"slurm\.gpus_per_node follows from trainer\.devices"),
        ([], {"time": "24:00:00"}, r"slurm\.time=24:00:00 must be a number of minutes"),
        ([], {"partion": "gpu"}, r"Unavailable parameter.*partion"),
        (["trainer=ddp"], {}, r"does not say how many GPUs it takes: set trainer\.devices"),
        (["trainer.requeue=true"], {}, r"would be requeued twice.*trainer\.requeue=false"),
    ],
)
def test_mistakes_are_errors_before_anything_is_submitted(tmp_path, settings, parameters, message):
    cell = SweepCell("a", {}, (), load_config(settings))
    with pytest.raises(ValueError, match=message):
        SlurmLauncher(tmp_path, "s", [cell], parameters, dry=True)


def test_what_sbatch_refuses_is_said(cluster):
    (cell,) = cells_of(["well"])
    launcher = SlurmLauncher(cluster / "sweep", "s", [cell], {"partition": "closed"}, command=command)
    with pytest.raises(ValueError, match=r"SLURM rejected cell 0-well: .*invalid partition"):
        launcher.start(cell, LedgerEntry(cell.id, {}, []))


def test_without_submitit_there_is_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r'pip install "prism-deco\[slurm\]"'):
        SlurmLauncher(tmp_path, "s", [], {})
