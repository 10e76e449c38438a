"""Runs one command in a session of its own and leaves nothing of it behind, whatever happens to either side.

Run as a script, with the standard library only: `python -I supervisor.py GRACE LOCK COMMAND...`. The process that
starts it holds the other end of its standard input:

- nothing is written: the command runs to its end, and the supervisor exits with its code (128 + signal if killed);
- `s`, or end of file because the starter was killed: the command gets SIGTERM, and SIGKILL after GRACE seconds;
- `k`: SIGKILL now.

In every case all processes that the command started, in whatever session they are, are killed and waited for before
the supervisor exits. LOCK is a file that is locked meanwhile: a second supervisor with the same file waits for its
turn. An empty LOCK locks nothing.
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
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PREEMPTED = 75
"""Exit code of `prism-deco train` after a checkpoint that it was asked for (EX_TEMPFAIL: try again)."""
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals with which a cluster or a user asks to stop. They may reach every process of a job, this one included."""


class Supervisor:
    """Supervises one command."""

    def __init__(self, grace: float):
        self.grace = grace
        self.deadline: float | None = None
        """When the command is killed; None: nobody asked it to stop."""
        self._pipe_open = True
        # Functions, not SIG_IGN: the command starts with the default handlers.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace

    def wait(self) -> None:
        """Sleeps for a moment, or until the starter has something to say."""
        if not self._pipe_open:
            time.sleep(POLL)
        elif select.select([0], [], [], POLL)[0]:
            said = os.read(0, 16)
            self._pipe_open = bool(said)
            self.stop()
            if b"k" in said:
                self.deadline = 0.0

    def acquire(self, path: str) -> int | None:
        """Locks the file; None where the supervisor is asked to stop before it could."""
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        while self.deadline is None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                self.wait()
        return None

    def run(self, command: list[str], locks: tuple[int, ...]) -> int:
        # The command inherits the lock, so that it stays taken should the supervisor itself be killed.
        leader = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=locks, preexec_fn=_tie(os.getpid())
        )
        asked = False
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == leader.pid:
                leader.returncode = os.waitstatus_to_exitcode(status)
                break
            if self.deadline is not None and time.monotonic() > self.deadline:
                _signal_group(leader.pid, signal.SIGKILL)
            elif self.deadline is not None and not asked:
                asked = True
                # The leader alone: it forwards the signal to its ranks, and its loader processes must not die first.
                os.kill(leader.pid, signal.SIGTERM)
            if pid == 0:
                self.wait()
        _signal_group(leader.pid, signal.SIGKILL)
        _bury_children()
        return leader.returncode if leader.returncode >= 0 else 128 - leader.returncode


def main(grace: float, lock: str, command: list[str]) -> int:
    supervisor = Supervisor(grace)
    if sys.platform == "linux":
        # Orphans of the command become children of the supervisor.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if not lock:
        return supervisor.run(command, ())
    taken = supervisor.acquire(lock)
    return PREEMPTED if taken is None else supervisor.run(command, (taken,))


def _tie(supervisor: int):
    """What the command does before it starts: it dies with the supervisor, and before it when memory runs out."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if libc is None:
            return
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:
            os._exit(128 + signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")

    return tie


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _bury_children() -> None:
    """Kills and waits for all that is left; their own children become children of the supervisor in turn."""
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
            # pid (name) state parent ...: the name may hold anything.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
