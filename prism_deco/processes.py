"""The ranks of a run on this machine: started and ended together, and how they tell each other why one failed."""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, start_processes

from prism_deco.distributed import World, environment_variables, exit_code
from prism_deco.errors import UsageError
from prism_deco.exits import SIGNALS, Preempted, RankFailed, Stop, as_stop, take_over
from prism_deco.logs import configure_logging

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that ranks have to end by themselves after one has failed, and once more after SIGTERM, before SIGKILL."""

_SHARED = ".ranks"
"""In the run's folder: an empty file per rank that is training, and the reason of the first that failed."""
_REASON = "failure.json"
_PATIENCE = 3.0
"""Seconds that a rank with a broken connection waits for the reason."""


def start_ranks(function: Callable[..., int], arguments: Sequence[Any], world: World) -> int:
    """Calls a function in one new process per device of this node, which this process supervises.

    Signals are passed on to the ranks. When one of them fails, the others end within seconds; when this process is
    killed, so are they.

    Args:
        function: picklable; returns an exit code. A `UsageError` or a `Stop` that it raises is raised here as well.
        arguments: its arguments, picklable.

    Returns:
        The exit code of the ranks.
    """
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with TemporaryDirectory(prefix="prism-deco-") as folder, environment_variables(world.variables | threads):
        place = (world.rank, Path(folder), logging.getLogger("prism_deco").level)
        with _Supervised() as supervised:
            context = start_processes(
                _run_rank, (function, tuple(arguments), *place), nprocs=world.devices, join=False, start_method="spawn"
            )
            assert context is not None
            try:
                supervised.attach(context)
                while not context.join(grace_period=GRACE):
                    pass
            except ProcessExitedException as error:
                return _outcome(error, _reports(Path(folder)), world.rank, supervised.asked)
            finally:
                _kill(context)
    return 0


class _Supervised:
    """Passes the signals that this process receives on to the ranks.

    Attributes:
        asked: the last of them.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._context: ProcessContext | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Supervised:
        if threading.current_thread() is threading.main_thread():
            self._old = take_over((signal.SIGINT, *SIGNALS), self._handle)
        if signal.SIGINT in self._old:
            # A terminal sends Ctrl-C to all processes; the ranks inherit that they ignore it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return self

    def attach(self, context: ProcessContext) -> None:
        """Begins with the signals that have come so far."""
        self._context = context
        if signal.SIGINT in self._old:
            signal.signal(signal.SIGINT, self._handle)
        if self.asked is not None:
            self._send(self.asked)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, *_: object) -> None:
        again = self.asked == number == signal.SIGINT
        self.asked = number
        asks = signal.SIGTERM if number == signal.SIGINT else number
        self._send(signal.SIGKILL if again else asks)

    def _send(self, number: int) -> None:
        for process in self._context.processes if self._context else ():
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _kill(context: ProcessContext) -> None:
    for process in context.processes:
        process.kill()
        process.join()


def _run_rank(
    index: int, function: Callable[..., int], arguments: Sequence[Any], first: int, folder: Path, level: int
) -> None:
    """What a new process does.

    Args:
        index: among the processes of this node.
        first: rank of the first of these.
        folder: where it reports the error that it ends with.
        level: of the command's log; 0 where logging is not configured.
    """
    _die_with_parent()
    os.environ |= {"RANK": str(first + index), "LOCAL_RANK": str(index)}
    if level:
        configure_logging(debug=level == logging.DEBUG)
    report: UsageError | Stop | str
    try:
        sys.exit(function(*arguments))
    except (UsageError, Stop) as error:
        error.add_note(traceback.format_exc())  # for --debug
        report, code = error, exit_code(error)
    except Exception as error:
        report, code = RankFailed(str(error)) if _is_broken_connection(error) else traceback.format_exc(), 1
    (folder / str(index)).write_bytes(pickle.dumps(report))
    sys.exit(code)


def _die_with_parent() -> None:
    """The kernel kills this process when the one that started it ends; where it has no such service, nothing does."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def _reports(folder: Path) -> list[UsageError | Stop | str]:
    """The errors that ranks ended with, but for those that failed because another one did."""
    return [pickle.loads(path.read_bytes()) for path in sorted(folder.iterdir())]


def _outcome(
    error: ProcessExitedException, reports: Sequence[UsageError | Stop | str], first: int, asked: int | None
) -> int:
    """Says why the ranks ended: raises the reason, or returns the exit code where it has been shown.

    Args:
        error: how the first of them ended.
        first: rank of the first process of this node.
        asked: the signal that the command was sent.
    """
    for report in reports:
        if isinstance(report, str):
            sys.stderr.write(report)
            return 1
    if asked == signal.SIGINT:
        raise KeyboardInterrupt
    number = -error.exit_code
    if number in SIGNALS:
        # The rank was not ready to save, and had nothing to save yet.
        raise Preempted(f"received {signal.Signals(number).name}")
    if number > 0:
        raise RankFailed(f"rank {first + error.error_index} was killed by {error.signal_name}")
    stops = [report for report in reports if not isinstance(report, str)]
    # A rank whose connection broke knows less about the reason than one that gave it.
    for stop in sorted(stops, key=lambda stop: isinstance(stop, RankFailed)):
        raise stop
    return error.exit_code


@contextmanager
def failure_recorded(folder: Path, world: World, record: Callable[[Stop], None]) -> Iterator[None]:
    """Records why a run ends early: once, by the process that failed first.

    The others fail because it did, with a broken connection, or with the same bug: they exit with its code and say
    nothing.

    Args:
        folder: the run's, which all processes see.
        record: called with the reason before it is raised.
    """
    shared = folder / _SHARED
    mark = shared / str(world.rank)
    if world.size > 1:
        shared.mkdir(exist_ok=True)
        mark.touch()
    try:
        yield
    except SystemExit:  # by a decision of rank 0, which says why
        raise
    except BaseException as error:
        mark.unlink(missing_ok=True)
        stop = as_stop(error)
        agreed = isinstance(stop, Preempted) and stop.agreed
        if stop is None and world.size > 1 and _is_broken_connection(error):
            world.leave()  # the processes that wait for this one fail, too
            stop = _silent_ranks(shared, error)
        elif stop is not None and not agreed and world.rank:
            stop = type(stop)(f"rank {world.rank}: {stop}")
        place = f"rank {world.rank}: " if world.rank else ""
        told = stop or RankFailed(f"{place}{type(error).__name__}: {error}{_location(error)}")
        if world.size > 1 and not agreed:
            _claim(shared, world, told, exit_code(stop or error))
        if world.is_main or not agreed:
            log.log(logging.WARNING if isinstance(told, Preempted) else logging.ERROR, "The run stopped: %s", told)
            record(told)
        if stop is None:
            raise
        raise stop from error
    mark.unlink(missing_ok=True)


def clear_failures(folder: Path) -> None:
    """Removes what the processes of a run have shared."""
    shutil.rmtree(folder / _SHARED, ignore_errors=True)


def _location(error: BaseException) -> str:
    """The innermost line of code that is no library's; empty for refused input, which has nothing to do with it."""
    if isinstance(error, UsageError):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _claim(shared: Path, world: World, reason: Stop, code: int) -> None:
    """Says why the run ends; exits where another process has done so before."""
    try:
        with (shared / _REASON).open("x", encoding="utf-8") as file:
            json.dump({"code": code, "text": str(reason)}, file)
    except FileExistsError:
        first = _read_reason(shared)
        if world.is_main:
            log.error("The run stopped: %s", first["text"])
        raise SystemExit(first["code"]) from None
    except OSError:
        pass  # on a full disk the reason is shown more than once


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error is how a process learns that another one failed. Gloo's are plain RuntimeErrors."""
    text = str(error).lower()
    gloo = isinstance(error, RuntimeError) and ("gloo" in text or "pair closure" in text)
    return gloo or isinstance(error, dist.DistError)


def _silent_ranks(shared: Path, error: BaseException) -> Stop | None:
    """Waits for the reason of another process. None where it was told, else the ranks that said nothing at all."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if (shared / _REASON).exists():
            return None
        time.sleep(0.1)
    silent = sorted(int(path.name) for path in shared.iterdir() if path.name.isdecimal())
    if not silent:
        return None
    ranks = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
    return RankFailed(f"{ranks} stopped responding ({str(error).splitlines()[0]})")


def _read_reason(shared: Path) -> dict[str, Any]:
    for _ in range(10):
        with suppress(ValueError, OSError):
            return json.loads((shared / _REASON).read_text(encoding="utf-8"))
        time.sleep(0.1)  # it is being written
    return {"code": 1, "text": "another process failed"}
