"""Reads what a run's folder holds: scores, relevance, curves, the end of its log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import read_yaml
from prism_deco.errors import UsageError
from prism_deco.report.benchmarks import family_of
from prism_deco.report.cells import Curve, Score

SHOWN = ("train/loss", "val/loss", "speed/samples_per_s")

_BOARD_NAMES = {"train/samples_per_s": "speed/samples_per_s"}
"""TensorBoard's names that differ; earlier versions plotted the speed under the name that reports use."""

TAIL_LINES = 8

_GROUPS = ("backbone", "projector", "llm", "data", "recipe", "evaluate")
_MANIFEST = ("data_hash", "params", "samples", "steps", "tokens")
_SCORE = ("benchmark", "data_hash", "decoding", "interval95", "metrics", "n", "primary", "prompt_hash")


def read_json(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a JSON file; `UsageError` where it is damaged or is missing one of the keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it is not a JSON object.")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UsageError(f"{path} is damaged: it has no {', '.join(missing)}.")
    return content


def read_run_config(path: Path) -> DictConfig:
    """A run's `config.yaml`, not checked against the schema: that would refuse the runs of other versions."""
    config = OmegaConf.create(read_yaml(path))
    missing = [name for name in _GROUPS if not isinstance(config.get(name), DictConfig)]
    if missing:
        raise UsageError(f"{path} is not a run's configuration: it has no {', '.join(missing)}.")
    return config


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a `manifest.json`."""
    content = read_json(path)
    return read_json(path, _MANIFEST) if content else {}


def read_scores(folder: Path, asked: Mapping[str, str]) -> dict[str, dict[str, Score]]:
    """By split and benchmark.

    Args:
        asked: by name, the choices of benchmarks.
    """
    scores: dict[str, dict[str, Score]] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        content = read_json(path, _SCORE)
        name = str(content["benchmark"])
        choice = asked.get(name, name)
        value = content["metrics"].get(content["primary"])
        if value is None:
            raise UsageError(f"{path} is damaged: it has no value of its primary metric, {content['primary']}.")
        low, high = content["interval95"]
        score = Score(name, float(value), (low, high), content, path.parent, choice, family_of(choice))
        # eval/<benchmark> holds the benchmark's own split, eval/<benchmark>-<split> another one.
        split = path.parent.name.removeprefix(name).removeprefix("-")
        scores.setdefault(split, {})[name] = score
    return scores


def read_relevance(folder: Path, config: DictConfig) -> dict[str, Any]:
    """What was measured of the benchmark that the configuration names; without a name, of the only one there is."""
    choice = config.evaluate.get("relevance")
    split = config.evaluate.get("split")
    if choice:
        name = Path(choice).stem if choice.endswith((".yaml", ".yml")) else choice
        # explain/<benchmark> holds the benchmark's own split, explain/<benchmark>-<split> another one.
        paths = [folder / f"{name}-{split}" / "metrics.json", folder / name / "metrics.json"]
    else:
        found = sorted(folder.glob("*/metrics.json"))
        paths = found if len(found) == 1 else []
    # Runs of earlier versions have one place for all benchmarks.
    for path in (*paths, folder / "metrics.json"):
        if path.is_file():
            content = read_json(path)
            if path.parent == folder or split in (None, content.get("split")):
                return content
    return {}


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves that a report shows, by name: losses from `metrics.jsonl`, which has every step, the rest from
    TensorBoard's files.

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
        except ValueError as error:
            raise UsageError(f"{path}, line {number} is damaged ({error}).") from error
        values = [record.get(name) for name in SHOWN] if isinstance(record, dict) and "step" in record else [""]
        if not all(value is None or isinstance(value, int | float) for value in values):
            raise UsageError(f"{path}, line {number} is damaged: it is not a record of a step's numbers.")
        for name, value in zip(SHOWN, values, strict=True):
            if value is not None:
                curves.setdefault(name, {})[int(record["step"])] = float(value)
    return curves


def _read_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Sample images and texts are not wanted; 0 keeps all scalars.
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "tensors": 1, "scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        name = _BOARD_NAMES.get(tag, tag)
        if name in SHOWN:
            curves[name] = {event.step: event.value for event in events.Scalars(tag)}
    return curves


def log_tail(folder: Path, recorded: Any) -> str:
    """The last lines that a run logged.

    Args:
        recorded: what the sweep's ledger holds of them, if anything.
    """
    if recorded:
        return recorded if isinstance(recorded, str) else "\n".join(map(str, recorded))
    for path in (folder.parent / "logs" / f"{folder.name}.log", folder / "train.log"):
        if path.is_file():
            return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    return ""
