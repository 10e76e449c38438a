"""What launchers share: the command of a cell, its environment, and the process that guards it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from prism_deco.sweep import supervisor as guard
from prism_deco.sweep.expand import Cell
from prism_deco.sweep.ledger import Entry

GRACE = 120.0
"""Seconds between SIGTERM and SIGKILL: a large model needs them for its checkpoint."""

DEFAULTS = ("trainer.preflight=true",)
"""What cells do unless their sweep says otherwise."""

FOREIGN = ("SUBMITIT_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "PL_", "MASTER_")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE")


class Handle(Protocol):
    """A started attempt."""

    @property
    def job(self) -> str | None:
        """The cluster's id of it."""
        ...

    def poll(self) -> int | None:
        """The exit code (128 + signal where one killed it) once nothing of the attempt is left."""
        ...

    def stop(self) -> None:
        """Asks it to save and stop, and kills it after a while."""
        ...

    def kill(self) -> None:
        """Kills it now."""
        ...


class Launcher(Protocol):
    """A way to run cells."""

    def fits(self, cell: Cell) -> bool:
        """Whether the cell can start beside those that run."""
        ...

    def start(self, cell: Cell, entry: Entry) -> Handle:
        """Starts an attempt."""
        ...

    def attach(self, cell: Cell, entry: Entry) -> Handle | None:
        """The attempt of an earlier driver that is still running on its own, if it can be."""
        ...

    def describe(self, cell: Cell, entry: Entry) -> str:
        """What `start` would do, as shell text."""
        ...


def train_command(folder: Path, entry: Entry, runs: Mapping[str, int] | None = None) -> list[str]:
    """The ordinary command line of a cell; nobody watches its first steps, so that `train` checks them.

    Args:
        runs: see `runs_per_cache`.
    """
    settings = [*entry.overrides, *entry.adjusted, f"runs_dir={folder}", f"run_id={entry.id}"]
    shared = (runs or {}).get(entry.id, 1)
    sharing = [f"trainer.feature_cache_runs={shared}"] if shared > 1 else []
    return [sys.executable, "-m", "prism_deco.cli", "train", *DEFAULTS, *sharing, *settings]


def log_path(folder: Path, cell_id: str) -> Path:
    return folder / "logs" / f"{cell_id}.log"


def lock_path(folder: Path, cell_id: str) -> Path:
    return folder / "logs" / f".{cell_id}.lock"


def clean_environment(*, cluster: bool = False) -> dict[str, str]:
    """This process's environment without what would tell a cell that it is a part of something else.

    Args:
        cluster: keep SLURM's variables: the cell is the job.
    """
    foreign = FOREIGN if cluster else (*FOREIGN, "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign) and name not in RANKS}
    # A log must show the last words of a process that dies, and where a segmentation fault happened.
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def start_guard(
    command: Sequence[str], *, log: IO[str] | None, lock: Path | None, env: Mapping[str, str], grace: float = GRACE
) -> subprocess.Popen[bytes]:
    """Starts a command under its guard; the guard's standard input is what stops it (see `guard.py`)."""
    # Isolated: neither the folder of guard.py nor the user's PYTHON* variables change what it imports.
    return subprocess.Popen(
        [sys.executable, "-I", guard.__file__, str(grace), str(lock or ""), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        bufsize=0,
        start_new_session=True,
        env=env,
    )
