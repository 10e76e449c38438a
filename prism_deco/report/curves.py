"""Reads what a run logged while it trained."""

from __future__ import annotations

import json
from pathlib import Path

from prism_deco.errors import UsageError
from prism_deco.report.cells import Curve

SHOWN = ("train/loss", "val/loss", "speed/samples_per_s")


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves of a run that a report shows, by name: losses from `metrics.jsonl`, which has every step, the rest
    from TensorBoard's files.

    A resumed run repeats the steps after its checkpoint; the last value of a step counts.
    """
    path = run / "metrics.jsonl"
    curves = _read_tensorboard(run / "tensorboard") | (_read_lines(path) if path.is_file() else {})
    return {name: sorted(values.items()) for name, values in curves.items()}


def _read_lines(path: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    content = path.read_bytes()
    # A line without its newline is still being written.
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            for name in SHOWN:
                if record.get(name) is not None:
                    curves.setdefault(name, {})[int(record["step"])] = float(record[name])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}, line {number} is damaged ({type(error).__name__}: {error}).") from error
    return curves


def _read_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Sample images and texts are not wanted; 0 keeps all scalars.
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "tensors": 1, "scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in SHOWN if name in known}
