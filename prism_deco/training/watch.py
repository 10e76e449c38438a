"""A thread per process that ends the run when another process of it has failed or stands still."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prism_deco.exits import STOPS, Preempted, RankFailed, Stop
from prism_deco.files import write_json
from prism_deco.training.ranks import Ranks

log = logging.getLogger(__name__)

_FOLDER = ".ranks"
_PERIOD = 0.3
_ALIVE = 3.0
"""Seconds after which a process writes its file again even if it stands still; silent for three times that, it is
stopped as a whole."""


def forget(folder: Path) -> None:
    """Removes what the processes of an earlier start told each other, before those of this one begin to listen."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


class Watch(threading.Thread):
    """Keeps a small file per process in the run's folder: how far it is, and why it failed.

    A process that waits in a collective can neither notice nor say anything by itself: this thread does.

    Args:
        on_failure: called in the first process of the run, before it ends, with the reason.
    """

    def __init__(self, folder: Path, ranks: Ranks, on_failure: Callable[[Stop], None]):
        super().__init__(daemon=True, name="watch")
        self._files = folder / _FOLDER
        self._ranks = ranks
        self._on_failure = on_failure
        self._beats = 0
        self._changed = math.inf
        self._heard: dict[int, tuple[int, float]] = {}
        self._done = threading.Event()
        self._parent = int(os.environ.get("PRISM_DECO_PARENT", "0"))

    def __enter__(self) -> Watch:
        if self._ranks.size > 1:
            self._files.mkdir(exist_ok=True)
            self._write()
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self) -> None:
        """Says that this process goes on: it begins another step, or another batch of a validation."""
        self._beats += 1
        self._changed = time.monotonic()

    def rest(self) -> None:
        """Says that there are no steps any more."""
        self._changed = math.inf

    def fail(self, stop: Stop) -> None:
        """Tells the other processes why this one ends."""
        self._done.set()
        if self._ranks.size > 1:
            with suppress(OSError):
                self._write(failure={"state": stop.state, "reason": str(stop)})

    def origin(self) -> Stop | None:
        """The failure of another process, if one has told."""
        deadline = time.monotonic() + 4 * _PERIOD
        while self._ranks.size > 1 and time.monotonic() < deadline:
            if failure := self._failure():
                return failure
            time.sleep(_PERIOD / 3)
        return None

    def clear(self) -> None:
        """Removes the files."""
        shutil.rmtree(self._files, ignore_errors=True)

    def run(self) -> None:
        written, at = self._beats, time.monotonic()
        while not self._done.wait(_PERIOD):
            if self._beats != written or time.monotonic() - at > _ALIVE:
                written, at = self._beats, time.monotonic()
                self._write()
            self._listen()
            if stop := self._orphaned() or self._failure() or self._child_failure() or self._stalled():
                self._end(stop)

    def _end(self, stop: Stop) -> None:
        if self._done.is_set():
            return
        if self._ranks.is_main:
            log.error("The run stops: %s", stop)
            self._on_failure(stop)
        self._ranks.kill()
        os._exit(stop.exit_code)  # the main thread waits for a process that will not answer

    def _write(self, **more: Any) -> None:
        content = {"beats": self._beats, "written": time.time_ns(), **more}
        write_json(self._files / f"{self._ranks.rank}.json", content, durable=False)

    def _others(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self._ranks.size):
            if rank != self._ranks.rank:
                with suppress(OSError, ValueError):
                    found[rank] = json.loads((self._files / f"{rank}.json").read_text(encoding="utf-8"))
        return found

    def _failure(self) -> Stop | None:
        for rank, content in self._others().items():
            if failure := content.get("failure"):
                return STOPS.get(failure["state"], RankFailed)(f"rank {rank}: {failure['reason']}")
        return None

    def _child_failure(self) -> Stop | None:
        for number, process in enumerate(self._ranks.processes, start=1):
            if process.poll() not in (None, 0, Preempted.exit_code):
                rank = self._ranks.rank + number
                # It may just have told why.
                return self._failure() or RankFailed(f"rank {rank} ended with code {process.returncode}")
        return None

    def _orphaned(self) -> Stop | None:
        if self._parent and os.getppid() != self._parent:
            return RankFailed("the first process of this node is gone")
        return None

    def _listen(self) -> None:
        """Notes when each of the others was last heard of, by this process's clock."""
        for rank, content in self._others().items():
            if rank not in self._heard or self._heard[rank][0] != content["written"]:
                self._heard[rank] = (content["written"], time.monotonic())

    def _silent(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, heard) in sorted(self._heard.items()) if now - heard > 3 * _ALIVE]

    def _stalled(self) -> Stop | None:
        waited = time.monotonic() - self._changed
        if waited < self._ranks.timeout.total_seconds():
            return None
        beats = {rank: content["beats"] for rank, content in self._others().items()} | {self._ranks.rank: self._beats}
        behind = [rank for rank, count in sorted(beats.items()) if count < max(beats.values())]
        if silent := self._silent():
            who = f"{_named(silent)} given no sign of life"
        elif behind:
            who = f"{_named(behind)} fallen behind the others"
        else:
            who = "all ranks are in the same step"
        return RankFailed(f"no progress for {waited / 60:.1f} minutes (trainer.timeout_minutes): {who}")


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
