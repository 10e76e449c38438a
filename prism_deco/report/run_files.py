"""Reads what a run's folder holds: scores, relevance, curves, the end of its log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import GROUPS, read_stored
from prism_deco.config.benchmarks import benchmark_name
from prism_deco.errors import UsageError
from prism_deco.report.benchmarks import family_of
from prism_deco.report.cells import SPEED, TRAIN_LOSS, VAL_LOSS, Curve, Score
from prism_deco.training.metrics import METRICS, read_metrics

SHOWN = (TRAIN_LOSS, VAL_LOSS, SPEED)

TAIL_LINES = 8

MANIFEST_KEYS = ("data_hash", "params", "samples", "steps", "tokens")
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
    config = OmegaConf.create(read_stored(path))
    missing = [group for group in (*GROUPS, "evaluate") if not isinstance(config.get(group), DictConfig)]
    if missing:
        raise UsageError(f"{path} is not a run's configuration: it has no {', '.join(missing)}.")
    return config


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
    split = config.evaluate.get("split")
    paths = sorted(folder.glob("*/metrics.json"))
    choice = config.evaluate.get("relevance")
    if choice:
        # explain/<benchmark> holds the benchmark's own split, explain/<benchmark>-<split> another one.
        name = benchmark_name(choice)
        paths = [path for path in paths if path.parent.name in (name, f"{name}-{split}")]
    contents = [read_json(path) for path in paths]
    found = [content for content in contents if split in (None, content.get("split"))]
    return found[0] if len(found) == 1 else {}


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves that a report shows, by name: losses from `metrics.jsonl`, which has every step, the speed from
    TensorBoard's files.

    A resumed run repeats the steps after its checkpoint; the last value of a step counts.
    """
    curves: dict[str, dict[int, float]] = _read_tensorboard(run / "tensorboard")
    try:
        for row in read_metrics(run):
            for name in SHOWN:
                if row.get(name) is not None:
                    curves.setdefault(name, {})[int(row["step"])] = float(row[name])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{run / METRICS} is damaged: a line is not a record of a step's numbers.") from error
    return {name: sorted(values.items()) for name, values in curves.items()}


def _read_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Sample images and texts are not wanted; 0 keeps all scalars.
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "tensors": 1, "scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag == SPEED]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


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
