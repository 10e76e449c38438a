"""Reads run folders and sweep folders."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.errors import UsageError
from prism_deco.report.benchmarks import asked_by, family_of
from prism_deco.report.cells import Cell, Score
from prism_deco.report.curves import read_curves
from prism_deco.stages import final_config

log = logging.getLogger(__name__)

TAIL_LINES = 8

_GROUPS = ("backbone", "projector", "llm", "data", "recipe", "evaluate")


def collect(folders: Iterable[Path]) -> list[Cell]:
    """The cells of sweep folders, and of run folders or folders of such, in the given order.

    Raises:
        UsageError: a folder is neither, or holds a ledger that cannot be read.
    """
    cells: list[Cell] = []
    runs: list[Cell] = []
    for folder in dict.fromkeys(folders):
        if (folder / "ledger.json").is_file():
            cells += _read_sweep(folder)
            continue
        found = [folder] if _is_run(folder) else sorted(path for path in folder.glob("*/") if _is_run(path))
        if not found:
            raise UsageError(f"{folder} is neither a run folder (config.yaml) nor a sweep's (ledger.json).")
        runs += [read_cell(run) for run in found]
    cells += _label(runs)
    repeated = {name for name, count in Counter(cell.id for cell in cells).items() if count > 1}
    return [replace(cell, id=f"{cell.folder.parent.name}/{cell.id}") if cell.id in repeated else cell for cell in cells]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "status.json").is_file()


def _read_sweep(folder: Path) -> list[Cell]:
    ledger = _read_json(folder / "ledger.json")
    if not isinstance(ledger.get("cells"), list):
        raise UsageError(f"{folder / 'ledger.json'} lists no cells: is it a sweep's?")
    return [read_cell(folder / record["id"], record) for record in ledger["cells"]]


def read_cell(folder: Path, record: Mapping[str, Any] | None = None) -> Cell:
    """One cell; whatever of it cannot be read becomes its state and reason, not an error.

    Args:
        folder: the run folder; it need not exist yet.
        record: what the sweep's ledger says of it.
    """
    record = record or {}
    state, reason = str(record.get("state") or "unknown"), str(record.get("reason") or "")
    config, names, status, asked, manifest, scores, relevance, curves = None, {}, {}, {}, {}, {}, {}, {}
    try:
        config = _read_config(folder, record)
        names = _names(config)
        asked = asked_by(config) if config is not None else {}
        if (folder / "status.json").is_file():
            status = _read_json(folder / "status.json")
            # A run that was killed could not say so; the sweep saw it end.
            if status["state"] != "running" or state in ("planned", "unknown"):
                state, reason = str(status["state"]), str(status.get("reason") or reason)
        if (folder / "manifest.json").is_file():
            scores, manifest = _read_scores(folder / "eval", asked), _read_json(folder / "manifest.json")
            relevance = _read_relevance(folder / "explain", config)
        curves = read_curves(folder)
    except Exception as error:  # files can be damaged in many ways, and one must not hide the other cells
        log.warning("%s cannot be read: %s", folder, error)
        state, reason = "unreadable", f"{type(error).__name__}: {error}"
    labels = {str(key): str(value) for key, value in (record.get("labels") or {}).items()}
    return Cell(
        id=str(record.get("id") or folder.name),
        folder=folder,
        labels=names | labels,
        state=state,
        reason=reason,
        log_tail=_log_tail(folder, record),
        attempts=record.get("attempts"),
        seconds=status.get("seconds") or record.get("seconds"),
        config=config,
        asked=asked,
        manifest=manifest,
        scores=scores,
        relevance=relevance,
        curves=curves,
    )


def _read_config(folder: Path, record: Mapping[str, Any]) -> DictConfig | None:
    if (folder / "config.yaml").is_file():
        # Not by the schema: that would refuse the runs of other versions.
        config = OmegaConf.load(folder / "config.yaml")
        groups = config if isinstance(config, DictConfig) else {}
        lacks = [name for name in _GROUPS if not isinstance(groups.get(name), DictConfig)]
        if lacks or not isinstance(config, DictConfig):
            raise UsageError(f"{folder / 'config.yaml'} is no run's configuration: it lacks {', '.join(lacks)}.")
        return config
    overrides: Sequence[str] = record.get("overrides") or ()
    if not overrides:
        return None
    config = final_config([*overrides, f"run_id={folder.name}"])  # as the sweep will launch it
    OmegaConf.resolve(config)
    return config


def _names(config: DictConfig | None) -> dict[str, str]:
    if config is None:
        return {}
    return {key: str(config[key].name) for key in ("backbone", "llm", "projector")} | {"seed": str(config.seed)}


def _read_scores(folder: Path, asked: Mapping[str, str]) -> dict[str, dict[str, Score]]:
    scores: dict[str, dict[str, Score]] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        content = _read_json(path)
        name = str(content["benchmark"])
        low, high = content["interval95"]
        value, choice = float(content["metrics"][content["primary"]]), asked.get(name, name)
        score = Score(name, value, (low, high), content, path.parent, choice, family_of(choice))
        # eval/<benchmark> holds the benchmark's own split, eval/<benchmark>-<split> another one.
        scores.setdefault(path.parent.name.removeprefix(name).removeprefix("-"), {})[name] = score
    return scores


def _read_relevance(folder: Path, config: DictConfig | None) -> dict[str, Any]:
    """What was measured of the benchmark that the configuration names; without a name, of the only one there is."""
    asked = config.evaluate if config is not None else {}
    choice, split = asked.get("relevance"), asked.get("split")
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
            content = _read_json(path)
            if path.parent == folder or split in (None, content.get("split")):
                return content
    return {}


def _label(runs: list[Cell]) -> list[Cell]:
    """Labels for runs that no sweep planned: what of data and recipe differs between them, and the run's own
    name where they differ in nothing that tables show."""
    flat = [_flatten(cell.config) for cell in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    # A run of an earlier version lacks the keys that were added since; that is no difference.
    axes = [key for key in keys if len({values[key] for values in flat if key in values}) > 1]
    labelled = [
        replace(cell, labels={**cell.labels, **{key: values[key] for key in axes if key in values}})
        for cell, values in zip(runs, flat, strict=True)
    ]
    places = Counter((cell.row, cell.variant, cell.seed, cell.blind) for cell in labelled)
    return [
        replace(cell, labels={**cell.labels, "projector.run": cell.id})
        if places[cell.row, cell.variant, cell.seed, cell.blind] > 1
        else cell
        for cell in labelled
    ]


def _flatten(config: DictConfig | None) -> dict[str, str]:
    if config is None:
        return {}
    content = {group: OmegaConf.to_container(config[group]) for group in ("data", "recipe")}
    flat = {f"{group}.{key}": str(value) for group, values in content.items() for key, value in dict(values).items()}  # type: ignore[call-overload]
    # How a step is cut into passes, how images are read and whether there are any is no axis of a comparison; nor is
    # the run that was started from: every projector has its own.
    for key in ("data.num_workers", "data.statistics", "recipe.micro_batch_size", "recipe.blind", "recipe.start_from"):
        flat.pop(key, None)
    return flat


def _log_tail(folder: Path, record: Mapping[str, Any]) -> str:
    tail = record.get("log_tail")
    if tail:
        return tail if isinstance(tail, str) else "\n".join(map(str, tail))
    for path in (folder.parent / "logs" / f"{folder.name}.log", folder / "train.log"):
        if path.is_file():
            return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it is no JSON object.")
    return content
