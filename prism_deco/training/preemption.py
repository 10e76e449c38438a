"""Signals that ask a run to stop, read by all processes at the same step; requeueing under SLURM."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prism_deco.exits import SIGNALS, Interrupted, Preempted, take_over, taken_over
from prism_deco.training.status import slurm_job

log = logging.getLogger(__name__)


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
