"""The task of a SLURM job; submitit starts it once per rank."""

from __future__ import annotations

import os
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from prism_deco.exits import PREEMPTED
from prism_deco.files import write_whole
from prism_deco.sweep.launchers import clean_environment, start_supervised


class CellFailed(RuntimeError):
    """Raised so that the task exits with an error, upon which srun kills the job's other tasks."""


@dataclass(frozen=True)
class Task:
    """Runs a cell's command under a supervisor."""

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
        if code not in (0, PREEMPTED):
            raise CellFailed(f"exit code {code}")
