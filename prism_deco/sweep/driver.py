"""The driver of a sweep: starts cells, monitors them, and records how they end."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from rich.live import Live

from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.launchers import LocalLauncher, Process, log_path
from prism_deco.sweep.ledger import Ledger, LedgerEntry
from prism_deco.sweep.live import render
from prism_deco.sweep.outcome import Heartbeat, Outcome, judge, stamp, tail
from prism_deco.sweep.slurm import SlurmJob, SlurmLauncher
from prism_deco.training.progress import read_status

log = logging.getLogger(__name__)

Launcher = LocalLauncher | SlurmLauncher
Handle = Process | SlurmJob

POLL = 0.5
"""Seconds between two polls of the processes."""
LOOKS = 20
"""Activity checks per timeout."""
PREEMPTIONS = 10
"""How often a driver requeues a preempted cell."""
MICRO_BATCH = "recipe.micro_batch_size"


@dataclass
class _Attempt:
    cell: SweepCell
    handle: Handle
    heartbeat: Heartbeat
    before: int | None
    """`stamp` of the run from before the attempt; None if an earlier driver started it."""
    spent: float
    """Seconds that earlier attempts took."""
    began: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    """Monotonic time of the last activity check."""
    hung: bool = False
    """Stopped by the driver for lack of activity."""


class Driver:
    """Runs the cells of a sweep that are not done.

    Args:
        ledger: with an entry for each cell.
        cells: the cells to run.
        launcher: where to run them.
        timeout: seconds without activity (output, or a change in the run folder) after which a cell counts as hung;
            None waits forever.
        live: display for the ledger table; None logs every change of state instead.
    """

    def __init__(
        self,
        ledger: Ledger,
        cells: Sequence[SweepCell],
        launcher: Launcher,
        *,
        timeout: float | None,
        live: Live | None = None,
    ):
        self.ledger = ledger
        self.launcher = launcher
        self.timeout = timeout
        self.live = live
        self.cells = {cell.id: cell for cell in cells}
        self.queue: deque[SweepCell] = deque()
        self.active: list[_Attempt] = []
        self.preemptions: Counter[str] = Counter()
        self.interrupts = 0
        self._heeded = 0

    def run(self) -> bool:
        """Runs until no cell is left or the user interrupts; returns whether all cells are done."""
        for cell in self.cells.values():
            self._resume(cell)
        with self._interruptible():
            # After an interrupt nothing is started, but the cells that run are waited for.
            while self.active or (self.queue and not self.interrupts):
                self._start()
                self._heed_interrupts()
                self._collect()
                if self.live is not None:
                    self.live.update(render(self.ledger, self.cells), refresh=True)
                time.sleep(POLL)
        if self.interrupts:
            # Only here, after all cells have ended and the former signal handlers are back.
            raise KeyboardInterrupt
        return all(self.ledger.entries[name].state == "done" for name in self.cells)

    def _resume(self, cell: SweepCell) -> None:
        """Attaches to, queues or skips a cell, depending on how an earlier driver left it."""
        entry = self.ledger.entries[cell.id]
        if entry.state == "running":
            handle = self.launcher.attach(cell, entry)
            if handle is not None:
                self.active.append(_Attempt(cell, handle, Heartbeat(*self._places(cell)), None, entry.seconds))
                return
        # It may have finished without a driver. All other states are tried again.
        if read_status(self.ledger.folder / cell.id).get("state") == "done":
            if entry.state != "done":
                self._record(entry, "done", reason=None, log_tail="", job=None)
            return
        if entry.state != "planned":
            self._record(entry, "planned", reason=f"planned again; it was {entry.state}", job=None)
        self.queue.append(cell)

    def _start(self) -> None:
        # Strictly in order, so that smaller cells cannot starve one that needs many GPUs.
        while self.queue and not self.interrupts and self.launcher.fits(self.queue[0]):
            cell = self.queue.popleft()
            entry = self.ledger.entries[cell.id]
            log_file, run = self._places(cell)
            heartbeat = Heartbeat(log_file, run)
            before = stamp(run)
            # Recorded before the start: if the driver is killed in between, the ledger still knows of the cell.
            self._record(entry, "running", attempts=entry.attempts + 1, started=time.time())
            handle = self.launcher.start(cell, entry)
            if handle.job is not None:
                self.ledger.update(cell.id, job=handle.job)
            self.active.append(_Attempt(cell, handle, heartbeat, before, entry.seconds))

    def _heed_interrupts(self) -> None:
        if self.interrupts > self._heeded:
            self._heeded = self.interrupts
            # The first interrupt lets the cells save, the next one kills them.
            once = self.interrupts == 1
            log.warning("Stopping %d cells%s", len(self.active), "; interrupt again to kill them" if once else " now")
            for attempt in self.active:
                attempt.handle.stop() if once else attempt.handle.kill()

    def _collect(self) -> None:
        for attempt in list(self.active):
            code = attempt.handle.poll()
            if code is not None:
                self.active.remove(attempt)
                self._finish(attempt, code)
            elif self.timeout is not None and not attempt.hung and self._is_silent(attempt, self.timeout):
                log.warning("%s has shown no activity for %.0f s; stopping it", attempt.cell.id, self.timeout)
                attempt.hung = True
                attempt.handle.stop()

    def _is_silent(self, attempt: _Attempt, timeout: float) -> bool:
        # Rarely, to spare a shared file system.
        if time.monotonic() - attempt.looked < timeout / LOOKS:
            return False
        attempt.looked = time.monotonic()
        return attempt.heartbeat.silence() > timeout

    def _finish(self, attempt: _Attempt, code: int) -> None:
        cell = attempt.cell
        entry = self.ledger.entries[cell.id]
        log_file, run = self._places(cell)
        outcome = judge(code, run, log_file, attempt.before)
        if attempt.hung and outcome.state != "done":
            outcome = Outcome("failed", f"hung: no activity for {self.timeout:.0f} s")
        elif self.interrupts and code > 128:
            # Killed by the second interrupt, or at the end of its grace period: stopped by the user, not failed.
            outcome = Outcome("preempted", None)
        entry.seconds = round(attempt.spent + time.monotonic() - attempt.began, 1)
        entry.log_tail = tail(log_file) if outcome.state in ("failed", "out_of_memory") else ""
        entry.job = None
        if outcome.state == "out_of_memory":
            self._out_of_memory(cell, entry, outcome)
        elif outcome.state == "preempted":
            self._preempted(cell, entry)
        elif outcome.state == "done" and entry.adjusted:
            self._record(entry, "done", reason=f"ran with {' '.join(entry.adjusted)} after running out of memory")
        else:
            self._record(entry, outcome.state, reason=outcome.reason)

    def _out_of_memory(self, cell: SweepCell, entry: LedgerEntry, outcome: Outcome) -> None:
        """Retries once with half the micro-batch size: the global batch stays, with more accumulation steps.

        If the loss is a mean over micro-batches, this changes its weights; the report then refuses to put the cell into
        one table with others, unless asked.
        """
        # The size of the attempt that has just ended.
        size = OmegaConf.merge(cell.config, OmegaConf.from_dotlist(entry.adjusted)).recipe.micro_batch_size
        if entry.adjusted or self.interrupts or size == 1:
            reason = f"at {MICRO_BATCH}={size}: {outcome.reason or 'out of memory'}"
            self._record(entry, "out_of_memory", reason=reason)
            return
        entry.adjusted = [f"{MICRO_BATCH}={size // 2}"]
        self._record(entry, "planned", reason=f"out of memory at {MICRO_BATCH}={size}, retrying at {size // 2}")
        self.queue.appendleft(cell)

    def _preempted(self, cell: SweepCell, entry: LedgerEntry) -> None:
        self.preemptions[cell.id] += 1
        if self.interrupts:
            reason = "stopped with the sweep"
        elif self.preemptions[cell.id] > PREEMPTIONS:
            reason = f"preempted {PREEMPTIONS + 1} times: run the sweep again to continue"
        else:
            reason = f"preempted, attempt {entry.attempts + 1} continues"
            self.queue.append(cell)
        self._record(entry, "preempted", reason=reason)

    def _record(self, entry: LedgerEntry, state: str, **changes: object) -> None:
        self.ledger.update(entry.id, state=state, **changes)
        if self.live is None:
            level = logging.WARNING if state in ("failed", "out_of_memory") else logging.INFO
            attempt = f", attempt {entry.attempts}" if state == "running" and entry.attempts > 1 else ""
            log.log(level, "%s: %s%s%s", entry.id, state, attempt, f" ({entry.reason})" if entry.reason else "")

    def _places(self, cell: SweepCell) -> tuple[Path, Path]:
        """The log and the run folder of a cell."""
        return log_path(self.ledger.folder, cell.id), self.ledger.folder / cell.id

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the cells save and stop; a second one kills them."""

        def interrupt(*_: object) -> None:
            # Only counted here: a signal may arrive while a cell has a process but no handle yet.
            self.interrupts += 1

        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                # The inner call installs the handler and returns the former one, which the stack puts back at the end.
                stack.callback(signal.signal, number, signal.signal(number, interrupt))
            yield
