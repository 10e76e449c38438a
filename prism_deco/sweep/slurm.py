"""Cells as SLURM jobs, submitted through submitit: one job per cell, one task per device."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from prism_deco.errors import UsageError
from prism_deco.exits import OUT_OF_MEMORY, PREEMPTED
from prism_deco.files import write_whole
from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.launchers import clean_environment, lock_path, log_path, start_supervised, train_command
from prism_deco.sweep.ledger import LedgerEntry
from prism_deco.sweep.supervisor import STOP_SIGNALS

log = logging.getLogger(__name__)

DEFAULTS = {"time": 24 * 60, "signal_delay_s": 300, "wckey": None}
"""Time limit of a job in minutes, and how many seconds before it the cell is asked to save. There is no `--wckey`
unless the user sets one: clusters that do not know submitit's default, `submitit`, refuse the job."""

DERIVED = {"nodes": "trainer.num_nodes", "gpus_per_node": "trainer.devices", "ntasks_per_node": "trainer.devices"}
"""sbatch options that follow from the cell's own settings."""

CODES = {"OUT_OF_MEMORY": OUT_OF_MEMORY} | dict.fromkeys(("TIMEOUT", "NODE_FAIL", "BOOT_FAIL"), PREEMPTED)
"""Exit codes by SLURM state, for jobs that ended before they could write one."""

CHECK_EVERY = 30.0
"""Seconds between two `sacct` queries about a job without a result, and the longest wait for the exit codes of a
completed job."""


class SlurmLauncher:
    """Submits cells as jobs.

    Args:
        folder: the sweep's folder, on a file system that the nodes share.
        name: the sweep's name, for the jobs' names.
        cells: all cells that will be run.
        parameters: submitit's names of sbatch options: partition, time (minutes), account, qos, mem, setup, ...
        jobs: jobs in the queue at a time; by default all.
        dry: only describe the jobs, which needs no cluster.
        command: builds the command line of a cell.

    Raises:
        UsageError: submitit or SLURM is missing, or a parameter is unknown or follows from the cell's settings.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        cells: Sequence[SweepCell],
        parameters: Mapping[str, Any],
        *,
        jobs: int | None = None,
        dry: bool = False,
        command: Callable[[Path, LedgerEntry], list[str]] = train_command,
    ):
        self.folder = folder.absolute()
        self.name = name
        self.command = command
        self.jobs = jobs or len(cells)
        self.running: list[SlurmJob] = []
        self._submitit = _import_submitit()
        self._dry = dry
        self.parameters = DEFAULTS | dict(parameters)
        for key, setting in DERIVED.items():
            if key in parameters:
                raise UsageError(f"slurm.{key} follows from {setting}: set that instead.")
        if not isinstance(self.parameters["time"], int):
            raise UsageError(f"slurm.time={self.parameters['time']} must be a number of minutes.")
        for cell in cells:
            if cell.config.trainer.devices < 1:
                raise UsageError(
                    f"Cell {cell.id} does not say how many GPUs it takes: set trainer.devices to a number, say 8."
                )
            if cell.config.trainer.requeue:
                raise UsageError(
                    f"Cell {cell.id} would be requeued twice, by itself and by the sweep: set trainer.requeue=false."
                )
            # Only to have wrong parameters refused before the first job is submitted.
            self._executor(cell)

    def fits(self, cell: SweepCell) -> bool:
        self.running = [job for job in self.running if not job.ended]
        return len(self.running) < self.jobs

    def start(self, cell: SweepCell, entry: LedgerEntry) -> SlurmJob:
        executor = self._executor(cell)
        executor.folder.mkdir(parents=True, exist_ok=True)
        try:
            job = SlurmJob(executor.submit(self._task(entry)), executor.folder)
        except RuntimeError as error:  # submitit's, with the message of sbatch
            raise UsageError(f"SLURM rejected cell {cell.id}: {error}") from error
        self.running.append(job)
        return job

    def attach(self, cell: SweepCell, entry: LedgerEntry) -> SlurmJob | None:
        if entry.job is None:
            return None
        executor = self._executor(cell)
        tasks = list(range(cell.config.trainer.devices * cell.config.trainer.num_nodes))
        log.info("%s is running as job %s, submitted earlier", cell.id, entry.job)
        job = SlurmJob(self._submitit.SlurmJob(executor.folder, entry.job, tasks), executor.folder)
        self.running.append(job)
        return job

    def describe(self, cell: SweepCell, entry: LedgerEntry) -> str:
        executor = self._executor(cell)
        # Private methods of submitit, which give the script that `submit` would write.
        script = executor._make_submission_file_text(executor._submitit_command_str, cell.id)
        return f"{script}\n# which runs, in every task:\n# {shlex.join(self._task(entry).command)}"

    def _task(self, entry: LedgerEntry) -> Task:
        command = tuple(self.command(self.folder, entry))
        log_file, lock_file = log_path(self.folder, entry.id), lock_path(self.folder, entry.id)
        return Task(command, log_file, lock_file, self.folder / "jobs")

    def _executor(self, cell: SweepCell) -> Any:
        """submitit's executor with the parameters of one cell."""
        settings = cell.config.trainer
        workers = cell.config.data.num_workers
        if workers is None:  # the task uses as many as its CPUs allow; see `data.loader.loader_workers`
            workers = 0 if settings.accelerator == "cpu" else 4
        own = {
            "job_name": f"{self.name}-{cell.id}",
            "nodes": settings.num_nodes,
            # One task per device: srun starts the ranks, and Lightning finds them in SLURM's variables.
            "ntasks_per_node": settings.devices,
            # The processes of the data loader, and the threads of the rank itself.
            "cpus_per_task": workers + (settings.threads or 1),
            "srun_args": ["--kill-on-bad-exit=1"],
        }
        if settings.accelerator != "cpu":
            own["gpus_per_node"] = settings.devices
        executor_class = self._submitit.SlurmExecutor
        if self._dry:  # passes submitit's check that SLURM is installed
            executor_class = type("SlurmExecutor", (executor_class,), {"affinity": classmethod(lambda cls: 2)})
        try:
            executor = executor_class(self.folder / "jobs")
            # The user's parameters replace those derived from the cell.
            executor.update_parameters(**own | self.parameters)
        except RuntimeError as error:
            raise UsageError(f"launcher=slurm: {error} --dry-run shows the jobs without a cluster.") from error
        except ValueError as error:  # an unknown parameter; the message lists the known ones
            raise UsageError(f"slurm.*: {error}") from error
        return executor


class CellFailed(RuntimeError):
    """Raised so that the task exits with an error, upon which srun kills the job's other tasks."""


@dataclass(frozen=True)
class Task:
    """Runs a cell's command under a supervisor; submitit starts it once per rank of a job."""

    command: tuple[str, ...]
    log: Path
    lock: Path
    codes: Path
    """Folder for the exit codes."""

    def __call__(self) -> None:
        rank = int(os.environ["SLURM_PROCID"])
        job = os.environ["SLURM_JOB_ID"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as file:
            if rank == 0:
                file.write(f"--- job {job}, {time.strftime('%F %T')}: {shlex.join(self.command)}\n")
                file.flush()
            # One log and one lock per cell: with the same lock, the ranks of a job would wait for each other.
            supervisor = start_supervised(
                self.command,
                log=file if rank == 0 else None,  # the other tasks' output goes to the job's own files
                lock=self.lock if rank == 0 else None,
                env=clean_environment(cluster=True),
            )
        assert supervisor.stdin is not None
        # Replaces submitit's handlers, which requeue: here the driver counts attempts and submits the next job.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda *_, pipe=supervisor.stdin: pipe.close())
        code = supervisor.wait()
        write_whole(self.codes / f"{job}_{rank}.code", str(code if code >= 0 else 128 - code))
        # A preempted rank ends without an error, so that srun does not kill ranks that are still saving.
        if code not in (0, PREEMPTED):
            raise CellFailed(f"exit code {code}")


class SlurmJob:
    """An attempt as a cluster job.

    Args:
        job: submitit's.
        codes: folder of the exit codes that the tasks write.
    """

    def __init__(self, job: Any, codes: Path):
        self._job = job
        self._codes = codes
        self._checked = time.monotonic()
        self._codeless_since: float | None = None
        self._stopping = False
        self.ended = False

    @property
    def job(self) -> str:
        return self._job.job_id

    def poll(self) -> int | None:
        if time.monotonic() - self._checked > CHECK_EVERY:
            self._checked = time.monotonic()
            self._job.get_info(mode="force")
        if not self._job.done():
            return None
        codes = [int(path.read_text()) for path in self._codes.glob(f"{self.job}_*.code")]
        if codes:
            self.ended = True
            return max(codes, key=_severity)
        # The first word: SLURM says who cancelled a job (`CANCELLED by 1000`).
        state = (self._job.get_info(mode="force").get("State") or "UNKNOWN").split()[0]
        self._codeless_since = self._codeless_since or time.monotonic()
        # Every task of a completed job has written its code, but a shared file system may show it late.
        if state == "COMPLETED" and time.monotonic() - self._codeless_since < CHECK_EVERY:
            return None
        self.ended = True
        # A job that the driver stopped while it was pending has no code either: it counts as stopped by a signal.
        return CODES.get(state, 128 + signal.SIGTERM if self._stopping else 1)

    def stop(self) -> None:
        self._stopping = True
        # The first call cancels the job if it is still pending, the second one tells it to save if it is running.
        for option in ("--state=PENDING", "--signal=USR2"):
            subprocess.run(["scancel", option, self.job], capture_output=True, check=False)

    def kill(self) -> None:
        self._job.cancel(check=False)


def _severity(code: int) -> int:
    """Order of exit codes: a failed rank explains those that were stopped because of it, and memory is the most common
    cause."""
    if code == OUT_OF_MEMORY:
        return 3
    return 1 if code == PREEMPTED or code - 128 in STOP_SIGNALS else 2 * (code != 0)


def _import_submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise UsageError('launcher=slurm needs submitit: pip install "prism-deco[slurm]".') from error
