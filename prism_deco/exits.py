"""How a run ends early: signals, reasons, and exit codes, which schedulers and `prism-deco sweep` act on."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to save a checkpoint and stop."""

PREEMPTED = 75
"""Exit code of a run that saved and stopped; the same command line resumes it (EX_TEMPFAIL)."""

OUT_OF_MEMORY = 76
"""Exit code of a run that ran out of memory."""


_owns_process = False


def take_over(numbers: Iterable[int], handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Installs a signal handler and returns the previous handlers. Signals that are ignored (`nohup`) stay ignored."""
    handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


@contextmanager
def taken_over(numbers: Iterable[int], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Installs a signal handler temporarily; does nothing outside the main thread, where Python allows none.

    After `own_process`, `SIGNALS` are ignored once the handler is removed: the exit code is decided by then.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = take_over(numbers if in_main_thread else (), handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_IGN if _owns_process and number in SIGNALS else earlier)


def own_process() -> None:
    """Declares that this process is the command or one of its ranks, and exits after the run."""
    global _owns_process
    _owns_process = True


class Stop(Exception):
    """Ends a run with a one-line reason.

    Attributes:
        state: of `status.json`.
        exit_code: of the process.
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
    """Ctrl-C: like a preemption, but the run is not requeued."""

    exit_code = 130  # as shells report SIGINT


class OutOfMemory(Stop):
    """The device or the host ran out of memory."""

    state = "out_of_memory"
    exit_code = OUT_OF_MEMORY


class NonFinite(Stop):
    """A loss or a gradient was infinite or NaN."""


class CheckpointFailed(Stop):
    """A checkpoint could not be written."""


class DiskFull(Stop):
    """A file could not be written because the disk is full."""


class RankFailed(Stop):
    """Another process of the run failed or stopped responding."""


def as_stop(error: BaseException) -> Stop | None:
    """The `Stop` for an exception; None if it is an error of another kind."""
    if isinstance(error, Stop):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted; the newest checkpoint is kept")
    text = str(error).lower()
    # Only for GPU memory does torch have an exception class; its CPU allocator raises a plain RuntimeError.
    on_host = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or on_host:
        return OutOfMemory(
            f"Out of memory ({' '.join(str(error).split())[:200]}). Lower recipe.micro_batch_size, set "
            "trainer.activation_checkpointing=full, or shard over more devices (trainer=fsdp)."
        )
    return None


class Preemption:
    """Records whether this process was asked to stop.

    Within `at_boundaries` the handler only sets a flag, which the processes compare once per step: all of them must
    save together, and signals reach them at different moments. Elsewhere a restart can repeat the work, so the handler
    raises `Preempted` or `Interrupted`. A second Ctrl-C ends the process at once.

    Args:
        alone: whether this is the run's only process. A rank may get one Ctrl-C twice, from a scheduler and from its
            parent, so it ignores the second; its parent kills it instead.

    Attributes:
        requested: how it was asked to stop; None if it was not.
    """

    def __init__(self, alone: bool = True) -> None:
        self._alone = alone
        self.requested: type[Preempted] | None = None
        self._waits = False
        self._pid = os.getpid()

    def watched(self) -> AbstractContextManager[None]:
        """Installs the signal handlers; does nothing outside the main thread."""
        return taken_over((signal.SIGINT, *SIGNALS), self._handle)

    @contextmanager
    def at_boundaries(self) -> Iterator[None]:
        """Only sets `requested` on a signal, instead of raising."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def claim(self) -> None:
        """Installs the handlers again, after Lightning has replaced them with its own."""
        if threading.current_thread() is threading.main_thread():
            take_over(SIGNALS, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked loader process, which a terminal's Ctrl-C reaches as well
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
    """Asks SLURM to requeue this job; logs a failure to do so."""
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
    """The id of this SLURM job in the format of `scontrol`; None outside SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that a disk is full, or that a quota or file-size limit is exceeded."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    # safetensors and tokenizers are written in Rust: their errors contain the reason only as text.
    return any(os.strerror(code) in str(error) for code in codes)
