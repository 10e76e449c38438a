"""A stand-in for `prism-deco train`: misbehaves as it is told, in little time.

Usage: fake_cell.py BEHAVIOUR RUN_FOLDER [KEY=VALUE ...]
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS = 20


def main(behaviour: str, run: Path, settings: list[str]) -> int:
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "starts", "a") as starts:
        starts.write(f"{os.getpid()} {' '.join(settings)}\n")
    _watch_for_twins(run)
    print(f"this is {behaviour}", flush=True)
    return globals()[f"_{behaviour}"](run, settings)


def _status(run: Path, state: str, **more: object) -> None:
    (run / "status.tmp").write_text(json.dumps({"state": state, **more}))
    os.replace(run / "status.tmp", run / "status.json")


def _watch_for_twins(run: Path) -> None:
    """Leaves the file `twins` where two processes of one cell are alive together."""
    owner = run / "owner"
    if owner.exists():
        pid = int(owner.read_text())
        alive = Path(f"/proc/{pid}/cmdline")
        if alive.exists() and str(run).encode() in alive.read_bytes():
            (run / "twins").touch()
    owner.write_text(str(os.getpid()))


def _well(run: Path, settings: list[str]) -> int:
    _status(run, "done", seconds=0.1)
    return 0


def _crash(run: Path, settings: list[str]) -> int:
    print("first line\nlast words", flush=True)
    return 1


def _confess(run: Path, settings: list[str]) -> int:
    _status(run, "failed", reason="ValueError: no such thing")
    return 1


def _lie(run: Path, settings: list[str]) -> int:
    _status(run, "trained")
    return 0


def _segfault(run: Path, settings: list[str]) -> int:
    import ctypes

    ctypes.string_at(0)
    return 0


def _hang(run: Path, settings: list[str]) -> int:
    time.sleep(1000)
    return 0


def _deaf(run: Path, settings: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run / "ready").touch()
    time.sleep(1000)
    return 0


def _hungry(run: Path, settings: list[str]) -> int:
    if "recipe.micro_batch_size=8" in settings:
        return _well(run, settings)
    _status(run, "out_of_memory", reason="16 records are too many")
    return 76


def _insatiable(run: Path, settings: list[str]) -> int:
    return 76


def _preempted_once(run: Path, settings: list[str]) -> int:
    if len((run / "starts").read_text().splitlines()) > 1:
        return _well(run, settings)
    _status(run, "preempted")
    return 75


def _preempted(run: Path, settings: list[str]) -> int:
    return 75


def _unequal(run: Path, settings: list[str]) -> int:
    """One rank crashes, the other waits for it for ever."""
    return _crash(run, settings) if os.environ["SLURM_PROCID"] == "1" else _hang(run, settings)


def _family(run: Path, settings: list[str]) -> int:
    """Leaves children behind: in its own session, and orphans in sessions of their own."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
    orphan = f"import subprocess; p = subprocess.Popen({sleeper!r}, start_new_session=True, stdout=-3); print(p.pid)"
    pids = [subprocess.Popen(sleeper).pid]
    pids.append(int(subprocess.check_output([sys.executable, "-c", orphan])))
    (run / "pids").write_text(" ".join(map(str, pids)))
    return _well(run, settings)


def _patient_family(run: Path, settings: list[str]) -> int:
    _family(run, settings)
    _status(run, "running")
    return _hang(run, settings)


def _slow(run: Path, settings: list[str]) -> int:
    """As `_steady`; slow enough at first to be stopped on its way."""
    return _steady(run, settings, pause=0.01 if (run / "checkpoint").exists() else 0.3)


def _steady(run: Path, settings: list[str], pause: float = 0.03) -> int:
    """Counts to `STEPS`, keeps where it is, saves and stops when it is asked to."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: asked.append(True))
    checkpoint = run / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    _status(run, "running", pid=os.getpid())
    while step < STEPS:
        time.sleep(pause)
        step += 1
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        if step % 5 == 0 or asked:
            (run / "checkpoint.tmp").write_text(str(step))
            os.replace(run / "checkpoint.tmp", checkpoint)
        if asked:
            _status(run, "preempted")
            return 75
    return _well(run, settings)


def _rung(run: Path, settings: list[str]) -> int:
    """Validates at a loss that depends on projector, learning rate and seed; the highest rate of maxpool diverges."""
    asked = dict(setting.split("=", 1) for setting in settings)
    projector, rate = asked["projector"], asked["recipe.lr"]
    if (projector, rate) == ("maxpool", "0.006"):
        return _crash(run, settings)
    losses = {"avgpool": {"0.003": (2.0, 3.0), "0.006": (1.0, 3.9)}, "maxpool": {"0.003": (5.0, 5.0)}}
    loss = losses[projector][rate][int(asked["seed"])]
    # The last validation counts, not the best.
    lines = [{"step": 1, "val/loss": 0.1}, {"step": 2, "train/loss": 9.0}, {"step": 2, "val/loss": loss}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return _well(run, settings)


def _environment(run: Path, settings: list[str]) -> int:
    rank = os.environ.get("SLURM_PROCID", "0")
    (run / f"environment{rank}.json").write_text(json.dumps(dict(os.environ)))
    time.sleep(0.5)
    return _well(run, settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
