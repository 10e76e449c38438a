"""Starts and supervises the ranks of a run on this machine, and shares the reason for a failure among all ranks."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

from prism_deco.distributed import World, exit_code
from prism_deco.errors import UsageError
from prism_deco.exits import SIGNALS, Preempted, RankFailed, Stop, as_stop, own_process, taken_over
from prism_deco.logs import configure_logging

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that the other ranks get to exit after one has failed, before they are killed."""

_RANK = """\
import sys
sys.path = sys.argv[2].split(":")
import signal
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a rank that is still importing ends without a traceback
from prism_deco.processes import _run_rank
_run_rank()
"""
_TASK = "task"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1

_SHARED = ".ranks"
"""Subfolder of the run's folder: an empty file per rank that is training, and the reason of the first failure."""
_REASON = "failure.json"
_PATIENCE = 3.0
"""Seconds that a rank with a broken connection waits for another rank's reason."""


def start_ranks(function: Callable[..., int], arguments: Sequence[Any], world: World) -> int:
    """Calls a function in one new process per device of this node, and supervises these ranks.

    Signals are forwarded to the ranks. If one rank fails, the others end within seconds. If this process is killed, the
    kernel kills the ranks. `torch.multiprocessing` does not guarantee that: a process arranges it only once it has
    imported torch, and with a signal that does not end a stopped process.

    Args:
        function: from an importable module; returns an exit code. A `UsageError` or `Stop` that it raises is raised
            here.
        arguments: its arguments, picklable.

    Returns:
        The exit code of the ranks.
    """
    with TemporaryDirectory(prefix="prism-deco-") as name:
        folder = Path(name)
        # Pickled by itself: unpickling it imports the function's module, which must happen after logging is set up.
        task = pickle.dumps((function, tuple(arguments)))
        (folder / _TASK).write_bytes(pickle.dumps((logging.getLogger("prism_deco").level, task)))
        ranks: list[Popen[bytes]] = []
        with _signals_forwarded(ranks) as received:
            try:
                for index in range(world.devices):
                    ranks.append(_start_rank(folder, index, world))
                if received:  # while ranks were still being started
                    _send(ranks, received[-1])
                codes = _wait(ranks)
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.wait()
        reports = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("[0-9]*"))]
    return _outcome(codes, reports, world.rank, received)


def _start_rank(folder: Path, index: int, world: World) -> Popen[bytes]:
    variables = world.variables | {
        "RANK": str(world.rank + index),
        "LOCAL_RANK": str(index),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    isolated = ["-I"] if sys.flags.isolated else []
    return Popen(
        [sys.executable, *isolated, "-c", _RANK, folder, ":".join(sys.path)],
        env=os.environ | variables,
        stdin=DEVNULL,
        process_group=0,  # so that a terminal's Ctrl-C reaches only this process, which forwards it once
        preexec_fn=partial(_die_with_parent, os.getpid()),
    )


def _die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the call above
            os._exit(1)


@contextmanager
def _signals_forwarded(ranks: Sequence[Popen[bytes]]) -> Iterator[list[int]]:
    """Forwards signals to the ranks: Ctrl-Z suspends them with this process, a second Ctrl-C kills them.

    Yields:
        The signals received so far, without Ctrl-Z.
    """
    received: list[int] = []

    def forward(number: int, *_: object) -> None:
        if number == signal.SIGTSTP:
            _send(ranks, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            _send(ranks, signal.SIGCONT)
            return
        again = number == signal.SIGINT and number in received
        received.append(number)
        _send(ranks, signal.SIGKILL if again else number)

    with taken_over((signal.SIGINT, signal.SIGTSTP, *SIGNALS), forward):
        yield received


def _send(ranks: Sequence[Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)


def _wait(ranks: Sequence[Popen[bytes]]) -> list[int | None]:
    """Waits until all ranks have ended, or until `GRACE` seconds after one has failed.

    Returns:
        Their exit codes, negative for signals; None for a rank that has not ended.
    """
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            deadline = min(deadline, time.monotonic() + GRACE)
        if None not in codes or time.monotonic() > deadline:
            return codes
        time.sleep(0.1)


def _run_rank() -> None:
    """The main function of a rank: runs the task, and reports an error in a file next to the task."""
    own_process()
    folder = Path(sys.argv[1])
    report: UsageError | Stop | str
    try:
        level, task = pickle.loads((folder / _TASK).read_bytes())
        if level:  # before unpickling the task imports libraries that warn
            configure_logging(debug=level == logging.DEBUG)
        function, arguments = pickle.loads(task)
        sys.exit(function(*arguments))
    except (UsageError, Stop) as error:
        error.add_note(traceback.format_exc())  # shown by --debug
        report, code = error, exit_code(error)
    except Exception as error:
        report, code = RankFailed(str(error)) if _is_broken_connection(error) else traceback.format_exc(), 1
    (folder / os.environ["LOCAL_RANK"]).write_bytes(pickle.dumps(report))
    sys.exit(code)


def _outcome(
    codes: Sequence[int | None], reports: Sequence[UsageError | Stop | str], first: int, received: Sequence[int]
) -> int:
    """Raises the reason why the ranks ended, or returns the exit code if the reason was already printed.

    Args:
        first: rank of the first process on this node.
    """
    for report in reports:
        if isinstance(report, str):
            sys.stderr.write(report)
            return 1
    for rank, code in enumerate(codes, start=first):
        if code is None or code >= 0:
            continue
        number = signal.Signals(-code)
        if number == signal.SIGINT or signal.SIGINT in received:
            raise KeyboardInterrupt
        if number in SIGNALS:
            # The signal came before the rank installed its handlers, so there is nothing to save yet.
            raise Preempted(f"received {number.name}")
        raise RankFailed(f"rank {rank} was killed by {number.name}")
    # Prefer any other reason to that of a rank whose connection broke: it only saw the consequence.
    for report in sorted(reports, key=lambda report: isinstance(report, RankFailed)):
        raise report  # type: ignore[misc]
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    return next((code for code in codes if code), 0)


@contextmanager
def failure_recorded(folder: Path, world: World, record: Callable[[Stop], None]) -> Iterator[None]:
    """Records why a run ends early: once, by the process that failed first.

    The others fail as a consequence (broken connection) or with the same bug; they exit silently with its code.

    Args:
        folder: the run's folder, which all processes can access.
        record: called with the reason before it is raised.
    """
    shared = folder / _SHARED
    mark = shared / str(world.rank)
    if world.size > 1:
        shared.mkdir(exist_ok=True)
        mark.touch()
    try:
        yield
    except SystemExit:  # raised by `World.decide`; rank 0 reports the reason
        raise
    except BaseException as error:
        mark.unlink(missing_ok=True)
        stop = as_stop(error)
        agreed = isinstance(stop, Preempted) and stop.agreed
        if stop is None and world.size > 1 and _is_broken_connection(error):
            world.leave()  # so that processes that wait for this one fail as well
            stop = _silent_ranks(shared, error)
        elif stop is not None and not agreed and world.rank:
            stop = type(stop)(f"rank {world.rank}: {stop}")
        place = f"rank {world.rank}: " if world.rank else ""
        reason = stop or RankFailed(f"{place}{type(error).__name__}: {error}{_location(error)}")
        if world.size > 1 and not agreed:
            _claim(shared, world, reason, exit_code(stop or error))
        if world.is_main or not agreed:
            log.log(logging.WARNING if isinstance(reason, Preempted) else logging.ERROR, "The run stopped: %s", reason)
            record(reason)
        if stop is None:
            raise
        raise stop from error
    mark.unlink(missing_ok=True)


def clear_failures(folder: Path) -> None:
    """Removes the files by which the processes of a run shared a failure."""
    shutil.rmtree(folder / _SHARED, ignore_errors=True)


def _location(error: BaseException) -> str:
    """The innermost code line outside site-packages, formatted; empty for a `UsageError`, which is not a bug."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own and not isinstance(error, UsageError) else ""


def _claim(shared: Path, world: World, reason: Stop, code: int) -> None:
    """Publishes the reason to the other processes; exits if another process has already published one."""
    try:
        with (shared / _REASON).open("x", encoding="utf-8") as file:
            json.dump({"code": code, "text": str(reason)}, file)
    except FileExistsError:
        first = _read_reason(shared)
        if world.is_main:
            log.error("The run stopped: %s", first["text"])
        raise SystemExit(first["code"]) from None
    except OSError:
        pass  # on a full disk, several processes may report a reason


def _read_reason(shared: Path) -> dict[str, Any]:
    for _ in range(10):
        with suppress(ValueError, OSError):
            return json.loads((shared / _REASON).read_text(encoding="utf-8"))
        time.sleep(0.1)  # it is being written
    return {"code": 1, "text": "another process failed"}


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error only shows that another process failed. Gloo raises plain RuntimeErrors."""
    text = str(error).lower()
    gloo = isinstance(error, RuntimeError) and ("gloo" in text or "pair closure" in text)
    return gloo or isinstance(error, dist.DistError)


def _silent_ranks(shared: Path, error: BaseException) -> Stop | None:
    """Waits for another process's reason. Returns None if there is one, or else names the ranks that gave none."""
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
