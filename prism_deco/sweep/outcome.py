"""How an attempt ended, judged by its exit code, `status.json` and log; and whether it is still active."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from prism_deco.exits import OUT_OF_MEMORY, PREEMPTED
from prism_deco.sweep.supervisor import STOP_SIGNALS
from prism_deco.training.progress import read_status

TAIL_LINES = 20
TAIL_BYTES = 16_384
_FRAME = re.compile(r'^  File "(.+)", line (\d+)', re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    state: str
    """done | failed | out_of_memory | preempted."""
    reason: str | None


def judge(code: int, run: Path, log: Path, before: object = None) -> Outcome:
    """The outcome of an attempt.

    Args:
        code: exit code; 128 + number if a signal killed it.
        run: the cell's run folder.
        log: its log, to which attempts append.
        before: `stamp(run)` from before the attempt, to ignore the status of an earlier one.
    """
    status = read_status(run)
    if code == 0:
        if status.get("state") == "done":
            return Outcome("done", None)
        return Outcome("failed", f"ended without an error, but status.json says {status.get('state', 'nothing')}")
    if stamp(run) == before:
        status = {}
    # A process that has not installed its signal handlers yet dies of the signal.
    if code == PREEMPTED or code - 128 in STOP_SIGNALS:
        return Outcome("preempted", None)
    if code == OUT_OF_MEMORY or status.get("state") == "out_of_memory":
        return Outcome("out_of_memory", status.get("reason"))
    if status.get("state") == "failed" and status.get("reason"):
        return Outcome("failed", status["reason"])
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"signal {code - 128}"
        hint = " (the machine's memory may have run out)" if name == "SIGKILL" else ""
        return Outcome("failed", f"killed by {name}{hint}")
    end = tail(log)
    said = f": {end.splitlines()[-1].strip()}" if end else ""
    # Python exits with 1 after an uncaught exception: only then can the log end with its traceback.
    return Outcome("failed", f"exit code {code}{said}{_location(end) if code == 1 else ''}")


def stamp(run: Path) -> int:
    """The modification time of `status.json` in ns, which identifies a version of it; 0 if there is none."""
    try:
        return (run / "status.json").stat().st_mtime_ns
    except OSError:
        return 0


def tail(log: Path) -> str:
    """The last lines of a log; of a progress bar, its last state."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    # A progress bar redraws its line after each `\r`: only what follows the last one is kept.
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-TAIL_LINES:])


def _location(text: str) -> str:
    """The innermost traceback line outside of installed libraries; empty if there is none."""
    files = [(file, line) for file, line in _FRAME.findall(text) if "site-packages" not in file]
    return f" ({files[-1][0]}, line {files[-1][1]})" if files else ""


class Heartbeat:
    """Watches a log and a run folder for activity, by this machine's clock only.

    Create it before the attempt starts: the clock starts at the attempt's first activity, so that time in a cluster's
    queue does not count.
    """

    def __init__(self, log: Path, run: Path):
        self._places = (log, run)
        self._seen = self._look()
        self._at: float | None = None

    def silence(self) -> float:
        """Seconds since a change was last noticed; 0 before the first."""
        seen = self._look()
        now = time.monotonic()
        if seen != self._seen:
            self._seen = seen
            self._at = now
        return 0.0 if self._at is None else now - self._at

    def _look(self) -> tuple[int, int]:
        """The newest modification time (ns) and the total size (bytes) of all files."""
        log, run = self._places
        # Earlier stages of a recipe have their own folders next to it.
        runs = [run, *run.parent.glob(f"{run.name}-*")]
        paths = [log]
        for top in runs:
            # os.walk, because unlike rglob it does not fail where a folder vanishes meanwhile.
            for place, _, names in os.walk(top):
                paths += [Path(place, name) for name in names]
        newest = size = 0
        for path in paths:
            try:
                stat = path.stat()
            except OSError:
                continue
            newest = max(newest, stat.st_mtime_ns)
            size += stat.st_size
        return newest, size
