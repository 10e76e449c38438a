"""`status.json` of a run's folder: running | preempted | failed | out_of_memory | trained | done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prism_deco.files import write_json

THROUGH = ("trained", "done")
"""States of a run whose training has finished; of the first the scoring is outstanding."""

_NAME = "status.json"


def set_status(folder: Path, state: str, **details: object) -> None:
    """Writes `status.json`."""
    content = {"state": state, **details}
    if job := slurm_job():
        content |= {"job": job, "restarts": _restarts()}
    path = folder / _NAME
    try:
        write_json(path, content)
    except OSError:
        if not path.is_file():
            raise
        # A full disk has no room for a second file, but the block of the first one is there.
        with path.open("r+", encoding="utf-8") as file:
            file.write(json.dumps(content))
            file.truncate()


def read_status(folder: Path) -> dict[str, Any]:
    """The content of `status.json`; empty where there is none that can be read."""
    try:
        status = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return status if isinstance(status, dict) else {}


def is_requeued(folder: Path) -> bool:
    """Whether this process belongs to a SLURM job that was queued again, and the run was begun before that."""
    status, job = read_status(folder), slurm_job()
    was_requeued = status.get("requeued", False) or _restarts() > status.get("restarts", 0)
    return job is not None and status.get("job") == job and was_requeued


def slurm_job() -> str | None:
    """The SLURM job of this process, as `scontrol` names it; None outside SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
