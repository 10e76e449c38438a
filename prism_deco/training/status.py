"""`status.json` of a run's folder: running | preempted | failed | out_of_memory | trained | done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prism_deco.files import write_json

THROUGH = ("trained", "done")
"""States of a run whose training is over; of the first the scoring is outstanding."""


def set_status(folder: Path, state: str, **details: object) -> None:
    """Writes `status.json`."""
    write_json(folder / "status.json", {"state": state, **details})


def read_status(folder: Path) -> dict[str, Any]:
    """The content of `status.json`; empty where there is none that can be read."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
