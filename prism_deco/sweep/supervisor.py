"""Runs one command in its own session and cleans up all its processes, even if the starter is killed.

Run as a script, with the standard library only: `python -I supervisor.py GRACE LOCK COMMAND...`. The process that
starts it holds the other end of its standard input:

- nothing is written: the command runs to its end, and the supervisor exits with its code (128 + signal if killed);
- `s`, or end of file because the starter was killed: the command gets SIGTERM, and SIGKILL after GRACE seconds;
- `k`: SIGKILL now.

In every case, all processes that the command started, in any session, are killed and reaped before the supervisor
exits. The file LOCK is locked meanwhile: a second supervisor with the same file waits for its turn. An empty LOCK locks
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL = 0.2
# Of <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PREEMPTED = 75
"""`prism_deco.exits.PREEMPTED`, which this script cannot import."""
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which a cluster or a user requests a stop. They may reach every process of a job, this one included."""


class Supervisor:
    """Supervises one command."""

    def __init__(self, grace: float):
        self.grace = grace
        self.deadline: float | None = None
        """Monotonic time at which the command is killed; None until a stop is requested."""
        self._pipe_open = True
        # Functions, since the command would inherit SIG_IGN.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace

    def wait(self) -> None:
        """Sleeps until the starter writes something, but at most for a moment."""
        if not self._pipe_open:
            # After its end, the input is always ready to be read: `select` would not wait.
            time.sleep(POLL)
        elif select.select([0], [], [], POLL)[0]:
            said = os.read(0, 16)
            self._pipe_open = bool(said)
            self.stop()
            if b"k" in said:
                # A time in the past: no grace.
                self.deadline = 0.0

    def acquire(self, path: str) -> int | None:
        """Locks the file and returns its descriptor; None if a stop is requested first."""
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        while self.deadline is None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                self.wait()
        return None

    def run(self, command: list[str], locks: tuple[int, ...]) -> int:
        # The command inherits the lock, which stays taken even if the supervisor is killed.
        leader = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=locks, preexec_fn=_tie(os.getpid())
        )
        asked = False
        while True:
            # Any child, since orphans of the command become children of the supervisor and are reaped here too.
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == leader.pid:
                # Popen did not see the exit, and has to be told.
                leader.returncode = os.waitstatus_to_exitcode(status)
                break
            if self.deadline is not None and time.monotonic() > self.deadline:
                _signal_group(leader.pid, signal.SIGKILL)
            elif self.deadline is not None and not asked:
                asked = True
                # Not the whole group: the leader forwards the signal to its ranks, and its data loader workers must
                # outlive them.
                os.kill(leader.pid, signal.SIGTERM)
            if pid == 0:
                self.wait()
        # Whatever is left of the command: first its process group, then orphans in other sessions.
        _signal_group(leader.pid, signal.SIGKILL)
        _bury_children()
        return leader.returncode if leader.returncode >= 0 else 128 - leader.returncode


def main(grace: float, lock: str, command: list[str]) -> int:
    supervisor = Supervisor(grace)
    if sys.platform == "linux":
        # Orphans of the command are reparented to the supervisor.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if not lock:
        return supervisor.run(command, ())
    taken = supervisor.acquire(lock)
    return PREEMPTED if taken is None else supervisor.run(command, (taken,))


def _tie(supervisor: int):
    """The `preexec_fn` of the command: it dies with the supervisor, and is the first to be killed if memory runs
    out."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if libc is None:
            return
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The supervisor may have died before the line above, which then has no effect.
        if os.getppid() != supervisor:
            os._exit(128 + signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")

    return tie


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _bury_children() -> None:
    """Kills and reaps all remaining children; their own children are reparented to the supervisor in turn."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(POLL / 10)


def _children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # `pid (name) state parent ...`, where the name may contain anything.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
