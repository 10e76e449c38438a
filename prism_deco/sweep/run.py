"""Runs a sweep, from its definition to the finished ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from omegaconf import OmegaConf
from rich.console import Console
from rich.live import Live

from prism_deco.errors import UsageError
from prism_deco.files import check_writable
from prism_deco.sweep.driver import Driver, Launcher
from prism_deco.sweep.expand import SweepCell, expand
from prism_deco.sweep.launchers import LocalLauncher
from prism_deco.sweep.ledger import Ledger, LedgerEntry, lock
from prism_deco.sweep.select import settle
from prism_deco.sweep.slurm import SlurmLauncher
from prism_deco.sweep.spec import Spec


def run(spec: Spec, *, jobs: int | None, timeout: float | None, console: Console) -> bool:
    """Runs the cells that are not done; returns whether all are.

    Args:
        jobs: cells at a time; None is the sweep's own number, or the launcher's default.
        timeout: seconds without activity after which a cell counts as hung; None waits forever.
        console: where the live table goes; without a terminal, changes are logged instead.
    """
    check_writable(spec.folder, "Choose another folder: runs_dir=FOLDER.")
    cells = expand(spec)
    launcher = _launcher(spec, cells, jobs)
    with lock(spec.folder), contextlib.ExitStack() as stack:
        ledger = Ledger.merge(spec.folder, spec.name, cells)
        ledger.write()
        OmegaConf.save(OmegaConf.create(_asked(spec)), spec.folder / "sweep.yaml")
        # The driver redraws it, so it needs no refresh thread.
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        started = 0
        # A round per level of `choose`: the results of one part let cells of the next one start.
        while True:
            cells = settle(cells, ledger)
            ledger = Ledger.merge(spec.folder, spec.name, cells)
            ledger.write()
            ready = [cell for cell in cells if not cell.waits]
            if len(ready) == started:
                return False  # nothing new to start: the remaining cells wait for results that will never come
            started = len(ready)
            done = Driver(ledger, ready, launcher, timeout=timeout, live=live).run()
            if len(ready) == len(cells):
                return done


def dry_run(spec: Spec, *, jobs: int | None) -> str:
    """What `run` would start, as shell text."""
    cells = expand(spec)
    launcher = _launcher(spec, cells, jobs, dry=True)
    # Merged in memory: a dry run writes nothing.
    ledger = Ledger.merge(spec.folder, spec.name, cells)
    cells = settle(cells, ledger)
    entries = [(cell, ledger.entries[cell.id]) for cell in cells]
    return "\n\n".join(f"# {_title(cell, entry)}\n{launcher.describe(cell, entry)}" for cell, entry in entries) + "\n"


def _launcher(spec: Spec, cells: Sequence[SweepCell], jobs: int | None, *, dry: bool = False) -> Launcher:
    if spec.launcher == "slurm":
        return SlurmLauncher(spec.folder, spec.name, cells, spec.slurm, jobs=jobs, dry=dry)
    if spec.slurm:
        raise UsageError(f"slurm.{next(iter(spec.slurm))} needs launcher=slurm.")
    return LocalLauncher(spec.folder, cells, jobs=jobs or spec.jobs)


def _asked(spec: Spec) -> dict[str, object]:
    """The sweep as the content of a `conf/sweep` YAML."""
    grids = {
        grid.name: {
            "settings": grid.settings,
            "rows": [{"labels": dict(row.labels), "settings": dict(row.settings)} for row in grid.rows],
            "axes": grid.axes,
        }
        | ({"choose": grid.choose} if grid.choose else {})
        for grid in spec.grids
    }
    # A sweep without parts has one grid, whose name is empty.
    asked = grids.get("", {"parts": grids, "one_table": spec.one_table})
    return asked | {"with": spec.choices, "jobs": spec.jobs, "controls": spec.controls}


def _title(cell: SweepCell, entry: LedgerEntry) -> str:
    waits = "".join(f", {key} is chosen by the results of {part}" for key, part in cell.choose.items() if cell.waits)
    return f"{entry.id}, {entry.state}{waits}"
