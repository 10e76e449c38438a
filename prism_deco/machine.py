"""The machine that a process runs on."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores that this process may use; in a container or batch job, often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
