"""Sweeps of fake cells: real processes that crash, hang, die and leave children behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cell import STEPS
from fake_sweep import drive

from prism_deco.sweep import driver
from prism_deco.sweep.ledger import Ledger, lock

FAKE_SWEEP = Path(__file__).parent / "fake_sweep.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(driver, "POLL", 0.05)


def _states(ledger: Ledger) -> dict[str, str]:
    return {name.partition("-")[2]: entry.state for name, entry in ledger.entries.items()}


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that mention the folder, and all that were started by one that does."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(folder) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _start(folder: Path, behaviours: list[str], *, jobs: int = 2, grace: float = 5) -> subprocess.Popen:
    command = [sys.executable, str(FAKE_SWEEP), str(folder), str(jobs), str(grace), *behaviours]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, start_new_session=True)


def test_no_fate_of_one_cell_touches_another(tmp_path):
    behaviours = ["crash", "confess", "lie", "segfault", "well", "hungry", "insatiable", "preempted_once", "well"]
    done, ledger = drive(tmp_path / "sweep", behaviours)
    assert not done
    entries = {name.partition("-")[2]: entry for name, entry in ledger.entries.items()}
    assert _states(ledger) == {
        "crash": "failed", "confess": "failed", "lie": "failed", "segfault": "failed", "well": "done",
        "hungry": "done", "insatiable": "out_of_memory", "preempted_once": "done",
    }  # fmt: skip
    assert entries["crash"].reason == "exit code 1: last words"
    assert entries["crash"].log_tail.splitlines()[-2:] == ["first line", "last words"]
    assert entries["confess"].reason == "ValueError: no such thing"
    assert entries["lie"].reason == "ended without an error, but status.json says trained"
    assert entries["segfault"].reason == "killed by SIGSEGV"
    assert "Segmentation fault" in entries["segfault"].log_tail
    assert (entries["well"].attempts, entries["well"].reason, entries["well"].log_tail) == (1, None, "")
    assert (entries["preempted_once"].attempts, entries["preempted_once"].reason) == (2, None)
    assert Ledger.read(tmp_path / "sweep").entries == ledger.entries
    assert not _processes_of(tmp_path)


def test_memory_that_ran_out_is_met_by_half_the_micro_batch_once(tmp_path):
    _, ledger = drive(tmp_path / "sweep", ["hungry", "insatiable"], jobs=1)
    hungry, insatiable = ledger.entries.values()
    starts = {name: (tmp_path / "sweep" / name / "starts").read_text().splitlines() for name in ledger.entries}
    assert [line.split()[1:] for line in starts[hungry.id]] == [["seed=0"], ["seed=0", "recipe.micro_batch_size=8"]]
    assert hungry.reason == "ran with recipe.micro_batch_size=8 after running out of memory"
    assert len(starts[insatiable.id]) == 2
    assert insatiable.reason == "at recipe.micro_batch_size=8: out of memory"


def test_a_preempted_cell_goes_back_into_the_queue_a_bounded_number_of_times(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "PREEMPTIONS", 2)
    done, ledger = drive(tmp_path / "sweep", ["preempted", "well"])
    cell = ledger.entries["0-preempted"]
    assert (done, cell.state, cell.attempts) == (False, "preempted", 3)
    assert _states(ledger)["well"] == "done"


def test_a_hung_cell_is_stopped_and_a_deaf_one_killed(tmp_path):
    done, ledger = drive(tmp_path / "sweep", ["hang", "deaf", "steady"], jobs=3, timeout=2.5, grace=1)
    assert not done
    assert _states(ledger) == {"hang": "failed", "deaf": "failed", "steady": "done"}
    assert ledger.entries["0-hang"].reason == "hung: no activity for 2 s"
    assert not _processes_of(tmp_path)


@pytest.mark.parametrize("behaviour", ["family", "patient_family"])
def test_no_child_outlives_its_cell(tmp_path, behaviour):
    _, ledger = drive(tmp_path / "sweep", [behaviour], timeout=2.5 if behaviour == "patient_family" else None, grace=2)
    pids = [int(pid) for pid in (tmp_path / "sweep" / f"0-{behaviour}" / "pids").read_text().split()]
    assert len(pids) == 2 and not any(map(_alive, pids))
    assert _states(ledger)[behaviour] == ("done" if behaviour == "family" else "failed")


def test_what_is_done_is_left_alone_and_the_rest_is_tried_again(tmp_path):
    drive(tmp_path / "sweep", ["well", "crash"])
    (tmp_path / "sweep" / "1-crash" / "status.json").write_text('{"state": "done"}')  # finished by hand
    done, ledger = drive(tmp_path / "sweep", ["well", "crash", "steady"])
    assert done and [entry.attempts for entry in ledger.entries.values()] == [1, 1, 1]
    (tmp_path / "sweep" / "0-well" / "status.json").unlink()
    _, ledger = drive(tmp_path / "sweep", ["well", "crash", "steady"])
    assert [entry.attempts for entry in ledger.entries.values()] == [2, 1, 1]


def test_an_old_failure_is_not_taken_for_a_new_one(tmp_path):
    run = tmp_path / "sweep" / "0-crash"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "out_of_memory", "reason": "long ago"}')
    _, ledger = drive(tmp_path / "sweep", ["crash"])
    assert ledger.entries["0-crash"].state == "failed"


def test_two_drivers_never_run_one_sweep(tmp_path):
    with lock(tmp_path), pytest.raises(ValueError, match=f"is being run by process {os.getpid()} on "):
        drive(tmp_path, ["well"])
    done, _ = drive(tmp_path, ["well"])
    assert done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_lets_its_cells_save_and_goes_on_later(tmp_path, number):
    folder, behaviours = tmp_path / "sweep", ["slow", "well", "well"]
    process = _start(folder, behaviours, jobs=1)
    _until(lambda: (folder / "0-slow" / "metrics.jsonl").exists())
    process.send_signal(number)
    assert process.wait(120) != 0
    assert not _processes_of(tmp_path)
    assert [entry.state for entry in Ledger.read(folder).entries.values()] == ["preempted", "planned", "planned"]
    done, ledger = drive(folder, behaviours)
    assert done
    steps = [json.loads(line)["step"] for line in (folder / "0-slow" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))  # it went on where it had saved
    assert ledger.entries["0-slow"].attempts == 2


def test_a_second_interrupt_kills_cells_that_do_not_listen(tmp_path):
    folder = tmp_path / "sweep"
    process = _start(folder, ["deaf"], grace=100)
    _until(lambda: (folder / "0-deaf" / "ready").exists())
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert Ledger.read(folder).entries["0-deaf"].state == "preempted"
    assert not _processes_of(tmp_path)


def test_the_cells_of_a_killed_driver_end_and_never_run_twice_at_once(tmp_path):
    folder = tmp_path / "sweep"
    process = _start(folder, ["deaf", "patient_family"], grace=2)
    _until(lambda: (folder / "0-deaf" / "ready").exists() and (folder / "1-patient_family" / "pids").exists())
    process.kill()
    process.wait()
    # At once: the old cells are still within their grace.
    done, ledger = drive(folder, ["deaf", "patient_family"], timeout=4, grace=1)
    assert not done and [entry.attempts for entry in ledger.entries.values()] == [2, 2]
    assert not list(folder.glob("*/twins"))
    assert len((folder / "0-deaf" / "starts").read_text().splitlines()) == 2
    assert not _processes_of(tmp_path)


def test_a_killed_guard_takes_its_cell_with_it(tmp_path):
    folder = tmp_path / "sweep"
    process = _start(folder, ["deaf"])
    _until(lambda: (folder / "0-deaf" / "ready").exists())
    next(p for p in psutil.Process(process.pid).children()).kill()
    assert process.wait(120) == 1
    assert "killed by SIGKILL" in str(Ledger.read(folder).entries["0-deaf"].reason)
    assert not _processes_of(tmp_path)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing_in_the_end(tmp_path):
    folder, behaviours = tmp_path / "sweep", ["steady"] * 4
    choose = random.Random(0)
    for _ in range(4):
        process = _start(folder, behaviours, grace=choose.choice([0, 5]))
        time.sleep(choose.uniform(0.5, 1.2))
        cells = [
            p for p in _processes_of(folder) if "-S" in p.cmdline() and "supervisor.py" not in " ".join(p.cmdline())
        ]
        for cell in cells[:1]:
            cell.kill()
        process.kill()
        process.wait()
    done, _ = drive(folder, behaviours)
    assert done and not list(folder.glob("*/twins"))
    for run in folder.glob("*-steady"):
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert set(steps) == set(range(1, STEPS + 1))
    assert not _processes_of(tmp_path)
