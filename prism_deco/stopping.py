"""How a run is asked to save and stop, and the exit codes by which it says how it ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""These ask a run to save and stop."""

PREEMPTED = 75
"""Exit code of a run that saved and stopped: the same command line goes on (EX_TEMPFAIL: try again)."""

OUT_OF_MEMORY = 76
"""Exit code of a run that had too little memory."""


def take_over(numbers: Iterable[int], handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Handles these signals, but those that this process is to ignore (`nohup` does so); returns the old handlers."""
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}
