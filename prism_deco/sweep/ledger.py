"""The ledger of a sweep: the state of each cell, and the reason for it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prism_deco.config import is_free
from prism_deco.errors import UsageError
from prism_deco.files import write_json
from prism_deco.sweep.expand import SweepCell, settings_of

log = logging.getLogger(__name__)


@dataclass
class LedgerEntry:
    """The record of one cell."""

    id: str
    labels: dict[str, Any]
    overrides: list[str]
    state: str = "planned"
    """planned | running | done | failed | out_of_memory | preempted"""
    attempts: int = 0
    started: float | None = None
    """Start of the last attempt, in seconds since 1970."""
    seconds: float = 0.0
    """Time spent on all attempts."""
    reason: str | None = None
    """Why the cell is in this state, in one line."""
    log_tail: str = ""
    """The last lines of a failed attempt's log."""
    adjusted: list[str] = field(default_factory=list)
    """Settings that a retry replaces: half the micro-batch size after running out of memory."""
    job: str | None = None
    """The cluster's job id, if the cell runs as a job."""


class Ledger:
    """The ledger of a sweep folder; every change is on disk before `update` returns.

    Args:
        folder: the sweep's folder.
        name: the sweep's name.
    """

    def __init__(self, folder: Path, name: str, entries: Iterable[LedgerEntry] = ()):
        self.folder = folder
        self.name = name
        self.entries = {entry.id: entry for entry in entries}

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """The ledger that an earlier driver wrote; `UsageError` if there is none or it is damaged."""
        path = folder / "ledger.json"
        if not path.is_file():
            raise UsageError(f"{folder} is not a sweep folder: it has no ledger.json.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, content["name"], [LedgerEntry(**entry) for entry in content["cells"]])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} is damaged ({type(error).__name__}: {error}). Restore it, or move it away: the same sweep "
                "command then rebuilds it and keeps the cells that are done."
            ) from error

    @classmethod
    def merge(cls, folder: Path, name: str, cells: Iterable[SweepCell]) -> Ledger:
        """The ledger of a new or existing sweep with these cells added. Other cells stay as they are. Nothing is
        written yet.

        Raises:
            UsageError: the folder's sweep has other axes, or defines a cell differently.
        """
        if (folder / "config.yaml").exists():
            raise UsageError(f"{folder} is a run folder: give the sweep another name, name=NAME.")
        ledger = cls.read(folder) if (folder / "ledger.json").exists() else cls(folder, name)
        # Labels are compared by name and order only: new values of known axes add cells.
        known_axes = {tuple(entry.labels) for entry in ledger.entries.values()}
        for cell in cells:
            # Parts are exempt: each may have axes of its own.
            if known_axes and not cell.part and tuple(cell.labels) not in known_axes:
                before = " or ".join(sorted(", ".join(axes) for axes in known_axes))
                raise UsageError(
                    f"{folder} is a sweep over {before}; this one is over {', '.join(cell.labels)}. Give it another "
                    "name: name=NAME."
                )
            entry = ledger.entries.get(cell.id)
            if entry is None:
                ledger.entries[cell.id] = LedgerEntry(cell.id, dict(cell.labels), list(cell.overrides))
            else:
                _update_definition(entry, cell, folder)
        return ledger

    def update(self, id: str, **changes: Any) -> None:
        """Changes an entry and writes the ledger."""
        for key, value in changes.items():
            assert hasattr(self.entries[id], key), key
            setattr(self.entries[id], key, value)
        self.write()

    def write(self) -> None:
        """Replaces `ledger.json` atomically."""
        content = {"name": self.name, "cells": [asdict(entry) for entry in self.entries.values()]}
        write_json(self.folder / "ledger.json", content)


def _update_definition(entry: LedgerEntry, cell: SweepCell, folder: Path) -> None:
    old, new = settings_of(entry.overrides), cell.settings
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    # A value that is still to be chosen is absent on one side.
    decided = [key for key in cell.choose if key not in old or key not in new]
    if fixed := [key for key in changed if not is_free(key) and key not in decided]:
        differences = "; ".join(
            f"{key} was {old.get(key, 'not given')} and is now {new.get(key, 'not given')}" for key in fixed
        )
        raise UsageError(
            f"Cell {cell.id} of {folder} was defined differently: {differences}. Give the changed sweep another name "
            "(name=NAME), or repeat the old settings."
        )
    if changed and entry.state == "done":
        log.warning("%s is done: it keeps its %s", cell.id, ", ".join(changed))
    elif changed and not cell.waits:
        # The new settings count from the next attempt on, which does not inherit a retry's smaller micro-batch.
        entry.overrides, entry.adjusted = list(cell.overrides), []


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks the sweep for one driver; `UsageError` if another driver holds the lock. It ends with the process, so a
    killed driver leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not opened with `w`: a refused driver must not erase the name of the one that holds the lock.
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(
                f"{folder} is being run by {file.read().strip()}: watch it with --status, or stop it first."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
