"""How a run ends before its time: the signals that ask it to stop, the reasons, and the exit codes.

Schedulers and `prism-deco sweep` act on the exit codes.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to save a checkpoint and stop."""

PREEMPTED = 75
"""Exit code of a run that saved and stopped; the same command line resumes it (EX_TEMPFAIL)."""

INTERRUPTED = 130
"""Exit code of a run that saved and stopped after Ctrl-C, as shells report it; the same command line resumes it."""

OUT_OF_MEMORY = 76
"""Exit code of a run that ran out of memory."""


_owns_process = False


def take_over(numbers: Iterable[int], handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Installs a handler for signals, except those the process was started to ignore (as `nohup` does).

    Returns:
        The previous handlers.
    """
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


@contextmanager
def taken_over(numbers: Iterable[int], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """`take_over` for what a process has to do; does nothing outside the main thread, where Python has no handlers.

    Where the process ends by that (`own_process`), the exit code is then decided: it ignores `SIGNALS` from there on.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = take_over(numbers if in_main_thread else (), handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_IGN if _owns_process and number in SIGNALS else earlier)


def own_process() -> None:
    """Says that this process is the command, or a rank of it: nothing follows what it was started for."""
    global _owns_process
    _owns_process = True


class Stop(Exception):
    """Ends a run with a one-line reason.

    Attributes:
        state: what `status.json` says.
        exit_code: what the process returns.
    """

    state = "failed"
    exit_code = 1


class Preempted(Stop):
    """A signal asked the run to save and stop; the same command line resumes it.

    Args:
        agreed: all processes stop at the same step.
    """

    state = "preempted"
    exit_code = PREEMPTED

    def __init__(self, reason: str, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


class Interrupted(Preempted):
    """Ctrl-C: like a preemption, but nobody waits to start the run again."""

    exit_code = INTERRUPTED


class OutOfMemory(Stop):
    """The device or the host ran out of memory."""

    state = "out_of_memory"
    exit_code = OUT_OF_MEMORY


class NonFinite(Stop):
    """A loss or a gradient was infinite or NaN."""


class CheckpointFailed(Stop):
    """A checkpoint could not be written."""


class DiskFull(Stop):
    """A file could not be written for want of space."""


class RankFailed(Stop):
    """Another process of the run failed, or stopped answering."""


def as_stop(error: BaseException) -> Stop | None:
    """The stop that an exception amounts to; None for an error of another kind."""
    if isinstance(error, Stop):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted; the newest checkpoint stays")
    text = str(error).lower()
    # torch has an exception class for GPU memory only; its CPU allocator raises a plain RuntimeError.
    on_host = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or on_host:
        return OutOfMemory(
            f"Out of memory ({' '.join(str(error).split())[:200]}). Lower recipe.micro_batch_size, set "
            "trainer.activation_checkpointing=full, or shard over more devices (trainer=fsdp)."
        )
    return None


class Preemption:
    """Whether this process was asked to stop.

    Signals reach the processes of a run at different moments, and saving takes all of them: within `at_boundaries`
    the handler only sets a flag, which the processes compare once per step. Elsewhere nothing is under way that a
    later start could not repeat, and the handler raises `Preempted` or `Interrupted`. A second Ctrl-C ends the
    process at once.

    Args:
        alone: no other process sees to this one. One of several may get the same Ctrl-C twice, from a scheduler and
            from the process that started it; that one ends it at once if it is meant.

    Attributes:
        requested: how it was asked; None if it was not.
    """

    def __init__(self, alone: bool = True) -> None:
        self._alone = alone
        self.requested: type[Preempted] | None = None
        self._waits = False
        self._pid = os.getpid()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles the signals; does nothing outside the main thread."""
        with taken_over((signal.SIGINT, *SIGNALS), self._handle):
            yield

    @contextmanager
    def at_boundaries(self) -> Iterator[None]:
        """Leaves it to the caller to look at `requested`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def claim(self) -> None:
        """Takes the signals back from Lightning, which installs its own handlers when it begins."""
        if threading.current_thread() is threading.main_thread():
            take_over(SIGNALS, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked loader process: a terminal's Ctrl-C reaches it as well
        if self.requested:
            if number == signal.SIGINT and self._alone:
                raise KeyboardInterrupt
            return
        self.requested = Interrupted if number == signal.SIGINT else Preempted
        name = signal.Signals(number).name
        if not self._waits:
            raise self.requested(f"received {name}")
        again = ", press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        log.warning("Received %s: saving after this step%s", name, again)


def requeue() -> None:
    """Asks SLURM to queue this job again; logs where that does not work."""
    job = slurm_job()
    if job is None:
        log.warning("trainer.requeue=true has no effect: this is not a SLURM job")
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("scontrol requeue %s failed (%s): requeue the job by hand", job, error)
    else:
        log.info("Requeued SLURM job %s", job)


def slurm_job() -> str | None:
    """The SLURM job of this process, as `scontrol` names it; None outside SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that a disk, a quota or the allowed size of a file is exhausted."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    # safetensors and tokenizers are written in Rust, and their errors have the reason in the text alone.
    return any(os.strerror(code) in str(error) for code in codes)
