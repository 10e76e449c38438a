"""Collects the runs of sweep folders and run folders."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import flat
from prism_deco.errors import UsageError
from prism_deco.report.benchmarks import asked_by
from prism_deco.report.cells import RunCell
from prism_deco.report.run_files import (
    MANIFEST_KEYS,
    log_tail,
    read_curves,
    read_json,
    read_relevance,
    read_run_config,
    read_scores,
)
from prism_deco.stages import final_config
from prism_deco.training.status import read_status

log = logging.getLogger(__name__)

_NO_AXES = ("data.num_workers", "data.statistics", "recipe.micro_batch_size", "recipe.blind", "recipe.start_from")
"""Settings that are not an axis of a comparison: how a step is cut into passes, how images are read and whether there
are any, and the run that was started from, since every projector has its own."""


def collect(folders: Iterable[Path]) -> list[RunCell]:
    """The cells of sweep folders, and of run folders or folders of such, in the given order.

    Raises:
        UsageError: a folder is neither, or holds a ledger that cannot be read.
    """
    cells: list[RunCell] = []
    runs: list[RunCell] = []
    for folder in dict.fromkeys(folders):
        if (folder / "ledger.json").is_file():
            cells += _read_sweep(folder)
            continue
        found = [folder] if _is_run(folder) else sorted(path for path in folder.glob("*/") if _is_run(path))
        if not found:
            raise UsageError(f"{folder} is neither a run folder (config.yaml) nor a sweep's (ledger.json).")
        log.info("Reading %d runs in %s", len(found), folder)
        runs += [read_cell(run) for run in found]
    cells += _label(runs)
    repeated = {name for name, count in Counter(cell.id for cell in cells).items() if count > 1}
    return [replace(cell, id=f"{cell.folder.parent.name}/{cell.id}") if cell.id in repeated else cell for cell in cells]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "status.json").is_file()


def _read_sweep(folder: Path) -> list[RunCell]:
    ledger = read_json(folder / "ledger.json")
    if not isinstance(ledger.get("cells"), list):
        raise UsageError(f"{folder / 'ledger.json'} lists no cells: is it a sweep's?")
    log.info("Reading the %d cells of %s", len(ledger["cells"]), folder)
    return [read_cell(folder / record["id"], record) for record in ledger["cells"]]


def read_cell(folder: Path, record: Mapping[str, Any] | None = None) -> RunCell:
    """One cell; what cannot be read of it becomes its state and reason, not an error: it must not hide the others.

    Args:
        folder: the run folder; it need not exist yet.
        record: what the sweep's ledger says of it.
    """
    record = record or {}
    labels = {str(key): str(value) for key, value in (record.get("labels") or {}).items()}
    cell = RunCell(
        id=str(record.get("id") or folder.name),
        folder=folder,
        labels=labels,
        state=str(record.get("state") or "unknown"),
        reason=str(record.get("reason") or ""),
        log_tail=log_tail(folder, record.get("log_tail")),
        attempts=record.get("attempts"),
        seconds=record.get("seconds"),
    )
    try:
        config = _read_config(folder, record)
        if config is not None:
            names = {key: str(config[key].name) for key in ("backbone", "llm", "projector")}
            labels = names | {"seed": str(config.seed)} | labels
            cell = replace(cell, config=config, asked=asked_by(config), labels=labels)
        cell = _with_status(cell)
        if (folder / "manifest.json").is_file():
            manifest = read_json(folder / "manifest.json", MANIFEST_KEYS)
            scores = read_scores(folder / "eval", cell.asked)
            relevance = read_relevance(folder / "explain", config) if config is not None else {}
            cell = replace(cell, manifest=manifest, scores=scores, relevance=relevance)
        return replace(cell, curves=read_curves(folder))
    except (UsageError, OSError) as error:
        log.warning("%s cannot be read: %s", folder, error)
        return replace(cell, state="unreadable", reason=str(error), manifest={}, scores={})


def _read_config(folder: Path, record: Mapping[str, Any]) -> DictConfig | None:
    if (folder / "config.yaml").is_file():
        return read_run_config(folder / "config.yaml")
    overrides = record.get("overrides") or []
    # The ledger may be somebody else's: as in a stored configuration, references are not followed.
    if not overrides or any("${" in override for override in overrides):
        return None
    config = final_config([*overrides, f"run_id={folder.name}"])  # as the sweep will launch it
    OmegaConf.resolve(config)
    return config


def _with_status(cell: RunCell) -> RunCell:
    status = read_status(cell.folder)
    if "state" not in status:
        return cell
    cell = replace(cell, started=status.get("started"), seconds=status.get("seconds") or cell.seconds)
    # A run that was killed could not say so; the sweep saw it end.
    if status["state"] == "running" and cell.state not in ("planned", "unknown"):
        return cell
    return replace(cell, state=str(status["state"]), reason=str(status.get("reason") or cell.reason))


def _label(runs: list[RunCell]) -> list[RunCell]:
    """Labels for runs that no sweep planned: what of data and recipe differs between them, and the run's own name
    where they differ in nothing that tables show."""
    settings = [_settings(cell.config) for cell in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    # A run of an earlier version does not have the keys that were added since; that is not a difference.
    axes = [key for key in keys if len({values[key] for values in settings if key in values}) > 1]
    labelled = [
        replace(cell, labels={**cell.labels, **{key: values[key] for key in axes if key in values}})
        for cell, values in zip(runs, settings, strict=True)
    ]
    places = Counter((cell.row, cell.variant, cell.seed, cell.blind) for cell in labelled)
    for number, cell in enumerate(labelled):
        if places[cell.row, cell.variant, cell.seed, cell.blind] > 1:
            labelled[number] = replace(cell, labels={**cell.labels, "projector.run": cell.id})
    return labelled


def _settings(config: DictConfig | None) -> dict[str, str]:
    values = flat(config) if config is not None else {}
    keys = [key for key in values if key.startswith(("data.", "recipe.")) and not key.startswith(_NO_AXES)]
    return {key: str(values[key]) for key in keys}
