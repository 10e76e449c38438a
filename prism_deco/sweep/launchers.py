"""How cells are started: command line, environment and supervisor of a cell, and the launcher for this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from prism_deco.errors import UsageError
from prism_deco.machine import cores
from prism_deco.sweep import supervisor
from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.ledger import LedgerEntry

GRACE = 120.0
"""Seconds between SIGTERM and SIGKILL, for a large model to write its checkpoint."""

DEFAULTS = ("trainer.preflight=true",)
"""Settings of every cell that its sweep may override: nobody watches the first steps of a cell."""

# Variables that would make a cell believe that it is a rank of another job.
FOREIGN = ("SUBMITIT_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "PL_", "MASTER_")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE")


def train_command(folder: Path, entry: LedgerEntry) -> list[str]:
    """The command line of a cell."""
    # Of two values for one key, `train` takes the last: a retry's settings replace the cell's own.
    settings = [*entry.overrides, *entry.adjusted, f"runs_dir={folder}", f"run_id={entry.id}"]
    return [sys.executable, "-m", "prism_deco.cli", "train", *DEFAULTS, *settings]


def log_path(folder: Path, cell_id: str) -> Path:
    return folder / "logs" / f"{cell_id}.log"


def lock_path(folder: Path, cell_id: str) -> Path:
    return folder / "logs" / f".{cell_id}.lock"


def clean_environment(*, cluster: bool = False) -> dict[str, str]:
    """This process's environment without the variables of another distributed job, which would mislead a cell.

    Args:
        cluster: keep SLURM's variables, since the cell is the job.
    """
    foreign = FOREIGN if cluster else (*FOREIGN, "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign) and name not in RANKS}
    # So that the log has the last output of a process that dies, and the traceback of a segmentation fault.
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def start_supervised(
    command: Sequence[str], *, log: IO[str] | None, lock: Path | None, env: Mapping[str, str], grace: float = GRACE
) -> subprocess.Popen[bytes]:
    """Starts a command under `supervisor.py`; closing the supervisor's standard input stops the command."""
    # Isolated mode (-I): neither the script's folder nor PYTHON* variables affect the supervisor's imports.
    # A session of its own keeps the terminal's Ctrl-C away from it. The pipe is unbuffered: each word is one byte, sent
    # at once.
    return subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, str(grace), str(lock or ""), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        bufsize=0,
        start_new_session=True,
        env=env,
    )


class LocalLauncher:
    """Runs cells as processes of this machine.

    Args:
        folder: the sweep's folder.
        cells: all cells that will be run.
        jobs: cells at a time; by default as many as fit on the GPUs without sharing one, or one on a CPU.
        gpus: names for CUDA_VISIBLE_DEVICES; this machine's GPUs by default.
        grace: seconds that a stopped cell has to save.
        command: builds the command line of a cell.

    Raises:
        UsageError: a cell asks for more GPUs than there are, or for several nodes.
    """

    def __init__(
        self,
        folder: Path,
        cells: Sequence[SweepCell],
        *,
        jobs: int | None = None,
        gpus: Sequence[str] | None = None,
        grace: float = GRACE,
        command: Callable[[Path, LedgerEntry], list[str]] = train_command,
    ):
        self.folder = folder.absolute()
        self.grace = grace
        self.command = command
        self.gpus = list(visible_gpus() if gpus is None else gpus)
        self.free = list(self.gpus)
        self.running = 0
        for cell in cells:
            if cell.config.trainer.num_nodes > 1:
                raise UsageError(f"Cell {cell.id} asks for {cell.config.trainer.num_nodes} nodes: use launcher=slurm.")
            if self.gpus and self._devices(cell) > len(self.gpus):
                raise UsageError(
                    f"Cell {cell.id} asks for {self._devices(cell)} GPUs, this machine shows {len(self.gpus)}: set "
                    "trainer.devices, or use launcher=slurm."
                )
        # By default, as many cells at a time as the GPUs hold of the largest one.
        most = max((self._devices(cell) for cell in cells), default=0)
        self.jobs = jobs or (max(1, len(self.gpus) // most) if most and self.gpus else 1)

    def fits(self, cell: SweepCell) -> bool:
        return self.running < self.jobs and (not self.gpus or self._devices(cell) <= len(self.free))

    def start(self, cell: SweepCell, entry: LedgerEntry) -> Process:
        taken, self.free = self.free[: self._devices(cell)], self.free[self._devices(cell) :]
        command = self.command(self.folder, entry)
        log = log_path(self.folder, cell.id)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"--- attempt {entry.attempts}, {time.strftime('%F %T')}: {shlex.join(command)}\n")
            file.flush()
            # The supervisor inherits the log's descriptor, so it may be closed here.
            process = start_supervised(
                command,
                log=file,
                lock=lock_path(self.folder, cell.id),
                env=clean_environment() | self._environment(cell, taken),
                grace=self.grace,
            )
        self.running += 1
        return Process(process, lambda: self._release(taken))

    def attach(self, cell: SweepCell, entry: LedgerEntry) -> None:
        if entry.job is not None:
            raise UsageError(f"Cell {cell.id} runs as SLURM job {entry.job}: use launcher=slurm, or scancel it.")
        # Nothing to attach to: the supervisors of a killed driver stop their cells, and new ones wait for their locks.

    def describe(self, cell: SweepCell, entry: LedgerEntry) -> str:
        own = self._environment(cell, self.gpus[: self._devices(cell)])
        return shlex.join([*(f"{name}={value}" for name, value in own.items()), *self.command(self.folder, entry)])

    def _environment(self, cell: SweepCell, gpus: Sequence[str]) -> dict[str, str]:
        """Variables for the GPUs and CPU threads of a cell; the user's OMP_NUM_THREADS counts if it is smaller."""
        # On a CPU, `_devices` is 0 and `trainer.devices` is the number of processes.
        processes = max(1, self._devices(cell), cell.config.trainer.devices)
        share = max(1, cores() // (self.jobs * processes))
        threads = cell.config.trainer.threads or share
        if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
            threads = min(threads, int(os.environ["OMP_NUM_THREADS"]))
        own = {"OMP_NUM_THREADS": str(threads)}
        if self.gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return own

    def _devices(self, cell: SweepCell) -> int:
        """Number of GPUs that a cell needs; -1 is all of them, as in Lightning."""
        settings = cell.config.trainer
        if settings.accelerator == "cpu" or (settings.accelerator == "auto" and not self.gpus):
            return 0
        return len(self.gpus) if settings.devices == -1 else settings.devices

    def _release(self, gpus: list[str]) -> None:
        self.running -= 1
        # Filtered from all GPUs, which keeps them in the machine's order.
        self.free = [gpu for gpu in self.gpus if gpu in (*self.free, *gpus)]


class Process:
    """An attempt on this machine, controlled through its supervisor process."""

    job: str | None = None

    def __init__(self, process: subprocess.Popen[bytes], release: Callable[[], None]):
        self._supervisor = process
        self._release = release

    def poll(self) -> int | None:
        """The exit code, or None while the attempt runs. Not to be called again after it has returned a code."""
        code = self._supervisor.poll()
        if code is None:
            return None
        self._release()
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()
        # Popen reports a signal as a negative number; here, as in a shell, it is 128 plus the signal.
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        self._say(b"s")

    def kill(self) -> None:
        self._say(b"k")

    def _say(self, word: bytes) -> None:
        assert self._supervisor.stdin is not None
        # It may have ended since the last poll.
        with contextlib.suppress(BrokenPipeError):
            self._supervisor.stdin.write(word)


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES if it is set, else those that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else []
