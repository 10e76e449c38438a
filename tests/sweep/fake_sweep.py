"""Drives a sweep of fake cells in a process of its own, so that a test can kill it.

Usage: fake_sweep.py FOLDER JOBS GRACE BEHAVIOUR ...: each cell's id is its number and behaviour.
"""

import sys
from pathlib import Path

from prism_deco.config import load_config
from prism_deco.sweep.driver import Driver
from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.launchers import LocalLauncher
from prism_deco.sweep.ledger import Ledger, LedgerEntry, lock

SCRIPT = Path(__file__).parent / "fake_cell.py"


def cells_of(behaviours: list[str]) -> list[SweepCell]:
    config = load_config(["trainer.threads=1"])
    return [SweepCell(f"{i}-{name}", {"behaviour": name}, (f"seed={i}",), config) for i, name in enumerate(behaviours)]


def command(folder: Path, entry: LedgerEntry) -> list[str]:
    behaviour = entry.id.partition("-")[2]
    return [sys.executable, "-S", str(SCRIPT), behaviour, str(folder / entry.id), *entry.overrides, *entry.adjusted]


def drive(folder: Path, behaviours: list[str], *, jobs: int = 2, grace: float = 5, timeout: float | None = None):
    """Runs the sweep and returns (all done, ledger)."""
    cells = cells_of(behaviours)
    with lock(folder):
        ledger = Ledger.merge(folder, folder.name, cells)
        launcher = LocalLauncher(folder, cells, jobs=jobs, gpus=[], grace=grace, command=command)
        return Driver(ledger, cells, launcher, timeout=timeout).run(), ledger


if __name__ == "__main__":
    done, _ = drive(Path(sys.argv[1]), sys.argv[4:], jobs=int(sys.argv[2]), grace=float(sys.argv[3]))
    sys.exit(0 if done else 1)
