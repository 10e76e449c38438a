"""Making way: signals of a scheduler, read by all processes at the same step."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prism_deco.exits import SIGNALS, Preempted, take_over

log = logging.getLogger(__name__)


class Preemption:
    """Whether this process was asked to make way.

    Signals reach the processes of a run at different moments, and saving takes all of them: within `at_boundaries`
    the handler only sets a flag, which the processes compare once per step. Elsewhere nothing is under way that a
    later start could not repeat, and the handler raises `Preempted`.

    Attributes:
        requested: a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waits = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles the signals; does nothing outside the main thread, where Python has no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = take_over(SIGNALS, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
        again = self.requested
        self.requested = True
        if not again:
            log.warning("Received %s: making way", signal.Signals(number).name)
        if not self._waits and not again:
            raise Preempted(f"received {signal.Signals(number).name}")


def requeue() -> None:
    """Asks SLURM to queue this job again; says so where that does not work."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID")
    if job is None:
        log.warning("trainer.requeue=true, but this is no SLURM job: nothing is queued again")
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("scontrol requeue %s failed (%s): queue the job again by hand", job, error)
    else:
        log.info("SLURM queues job %s again", job)
