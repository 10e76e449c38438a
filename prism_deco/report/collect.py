"""Collects the runs of sweep folders and run folders: their scores, relevance, curves and logs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import GROUPS, flat, read_stored, read_yaml
from prism_deco.config.choices import TOKENS, choice_name
from prism_deco.errors import UsageError
from prism_deco.files import read_json, read_result, refusals_named
from prism_deco.report.benchmarks import asked_by, family_of
from prism_deco.report.cells import SPEED, TRAIN_LOSS, VAL_LOSS, Curve, RunCell, Score
from prism_deco.stages import final_config
from prism_deco.training.progress import METRICS, read_metrics, read_status

log = logging.getLogger(__name__)

SHOWN = (TRAIN_LOSS, VAL_LOSS, SPEED)

TAIL_LINES = 8

_MANIFEST = ("data_hash", "params", "samples", "steps", "tokens")
_SCORE = ("benchmark", "data_hash", "decoding", "interval95", "metrics", "n", "primary", "prompt_hash")

_TOKENS_KEYS = ("num_tokens", "compressor", "options", "first_token_seconds")

_NO_AXES = ("data.num_workers", "data.statistics", "recipe.micro_batch_size", "recipe.blind", "recipe.start_from")
"""Settings that are no axis of a comparison: how a step is split into micro-batches, how images are loaded and whether
there are any, and the run that training starts from, since each projector has its own."""


def collect(folders: Iterable[Path]) -> list[RunCell]:
    """The cells of sweep folders, run folders, and folders of run folders, in the given order.

    Raises:
        UsageError: a folder is none of these, or its ledger cannot be read.
    """
    cells: list[RunCell] = []
    runs: list[RunCell] = []
    for folder in dict.fromkeys(folders):
        with refusals_named(folder, "Name run folders, or a sweep's."):
            is_sweep = (folder / "ledger.json").is_file()
        if is_sweep:
            cells += _read_sweep(folder)
            continue
        found = [folder] if _is_run(folder) else sorted(path for path in folder.glob("*/") if _is_run(path))
        if not found:
            raise UsageError(f"{folder} is neither a run folder (config.yaml) nor a sweep's (ledger.json).")
        log.info("Reading %d runs in %s", len(found), folder)
        runs += [read_cell(run) for run in found]
    cells += _label(runs)
    # Each cell is followed by those of the same run with other numbers of visual tokens.
    cells = [one for cell in cells for one in (cell, *_with_other_tokens(cell))]
    # Ids that occur more than once, for example in two sweeps, get the name of the folder around the run.
    repeated = {name for name, count in Counter(cell.id for cell in cells).items() if count > 1}
    return [replace(cell, id=f"{cell.folder.parent.name}/{cell.id}") if cell.id in repeated else cell for cell in cells]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "status.json").is_file()


def _read_sweep(folder: Path) -> list[RunCell]:
    ledger = read_json(folder / "ledger.json")
    if not isinstance(ledger.get("cells"), list):
        raise UsageError(f"{folder / 'ledger.json'} lists no cells: is it a sweep's?")
    log.info("Reading the %d cells of %s", len(ledger["cells"]), folder)
    asked = read_yaml(folder / "sweep.yaml") if (folder / "sweep.yaml").is_file() else {}
    cells = [read_cell(folder / record["id"], record) for record in ledger["cells"]]
    return [replace(cell, control=cell.projector in (asked.get("controls") or ())) for cell in cells]


def read_cell(folder: Path, record: Mapping[str, Any] | None = None) -> RunCell:
    """One cell. A folder that cannot be read gives a cell of state `unreadable` instead of an error, which would hide
    the other cells.

    Args:
        folder: the run folder; it need not exist yet.
        record: its entry in the sweep's ledger.
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
            # The ledger's labels win over those read from the configuration.
            labels = names | {"seed": str(config.seed)} | labels
            cell = replace(cell, config=config, asked=asked_by(config), labels=labels)
        cell = _with_status(cell)
        if (folder / "manifest.json").is_file():
            manifest = read_json(folder / "manifest.json", _MANIFEST)
            scores = read_scores(folder / "eval", cell.asked)
            relevance = read_relevance(folder / "explain", config) if config is not None else {}
            first_token = _read_tokens(folder / "eval").get("first_token_seconds")
            cell = replace(cell, manifest=manifest, scores=scores, relevance=relevance, first_token_seconds=first_token)
        return replace(cell, curves=read_curves(folder))
    except (UsageError, OSError) as error:
        log.warning("%s cannot be read: %s", folder, error)
        return replace(cell, state="unreadable", reason=str(error), manifest={}, scores={})


def _read_config(folder: Path, record: Mapping[str, Any]) -> DictConfig | None:
    path = folder / "config.yaml"
    if path.is_file():
        # Not validated against the schema, which would reject runs of other versions.
        config = OmegaConf.create(read_stored(path))
        missing = [group for group in (*GROUPS, "evaluate") if not isinstance(config.get(group), DictConfig)]
        if missing:
            raise UsageError(f"{path} is not a run's configuration: it has no {', '.join(missing)}.")
        return config
    overrides = record.get("overrides") or []
    # The ledger may come from somebody else: as in a stored configuration, interpolations are not resolved.
    if not overrides or any("${" in override for override in overrides):
        return None
    config = final_config([*overrides, f"run_id={folder.name}"])  # as the sweep will launch it
    OmegaConf.resolve(config)
    return config


def _read_tokens(folder: Path) -> dict[str, Any]:
    """The `tokens.json` of a results folder; empty in results of earlier versions, which have none."""
    return read_json(folder / TOKENS, _TOKENS_KEYS) if (folder / TOKENS).is_file() else {}


def _with_other_tokens(cell: RunCell) -> Iterable[RunCell]:
    """A cell for each other number of visual tokens that a run was scored with, by its projector or a compressor."""
    for path in sorted(cell.folder.glob(f"eval/*/{TOKENS}")) if cell.manifest else ():
        about = _read_tokens(path.parent)
        tokens, name = about["num_tokens"], about["compressor"]
        labels = {**cell.labels, "recipe.num_tokens": str(tokens)}
        if name:
            options = [f"{key}={value}" for key, value in about["options"].items()]
            labels["projector"] = " ".join([cell.projector, "+", name, *options])
        elif cell.config is None or tokens not in (cell.config.evaluate.get("num_tokens") or ()):
            labels["projector"] = f"{cell.projector} trained with {cell.tokens}"  # scored by `evaluate` afterwards
        yield replace(
            cell,
            id=f"{cell.id}/{path.parent.name}",
            labels=labels,
            compressor=name or "",
            # `RunCell.tokens` and `RunCell.compressed` read the number from here.
            manifest={**cell.manifest, "tokens": {**cell.manifest["tokens"], "visual_out": tokens}},
            scores=read_scores(path.parent, cell.asked),
            relevance={},
            first_token_seconds=about["first_token_seconds"],
            curves={SPEED: cell.curves[SPEED]} if SPEED in cell.curves else {},  # the losses are the run's own
        )


def _with_status(cell: RunCell) -> RunCell:
    status = read_status(cell.folder)
    if "state" not in status:
        return cell
    cell = replace(cell, started=status.get("started"), seconds=status.get("seconds") or cell.seconds)
    # A killed run still says `running`; the ledger knows better.
    if status["state"] == "running" and cell.state not in ("planned", "unknown"):
        return cell
    return replace(cell, state=str(status["state"]), reason=str(status.get("reason") or cell.reason))


def _label(runs: list[RunCell]) -> list[RunCell]:
    """Labels runs outside a sweep with the settings of data and recipe in which they differ, and with the run's name
    where two would still have the same place in a table."""
    settings = [_settings(cell.config) for cell in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    # A run of an earlier version does not have the keys that were added since; that is not a difference.
    axes = [key for key in keys if len({values[key] for values in settings if key in values}) > 1]
    labelled = []
    for cell, values in zip(runs, settings, strict=True):
        own = {key: values[key] for key in axes if key in values}
        labelled.append(replace(cell, labels={**cell.labels, **own}))
    places = Counter((cell.row, cell.variant, cell.seed, cell.blind) for cell in labelled)
    for number, cell in enumerate(labelled):
        if places[cell.row, cell.variant, cell.seed, cell.blind] > 1:
            labelled[number] = replace(cell, labels={**cell.labels, "projector.run": cell.id})
    return labelled


def _settings(config: DictConfig | None) -> dict[str, str]:
    values = flat(config) if config is not None else {}
    # A prefix is enough to leave a key out: `data.statistics` has keys of its own below it.
    keys = [key for key in values if key.startswith(("data.", "recipe.")) and not key.startswith(_NO_AXES)]
    return {key: str(values[key]) for key in keys}


def read_scores(folder: Path, asked: Mapping[str, str]) -> dict[str, dict[str, Score]]:
    """The scores below a folder, by split and benchmark.

    Args:
        asked: the benchmarks' choices, by name.
    """
    scores: dict[str, dict[str, Score]] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        content = read_result(path, _SCORE)
        name = str(content["benchmark"])
        choice = asked.get(name, name)
        value = content["metrics"][content["primary"]]
        low, high = content["interval95"]
        score = Score(float(value), (low, high), content, path.parent, choice, family_of(choice))
        # eval/<benchmark> holds the benchmark's own split, eval/<benchmark>-<split> another one.
        split = path.parent.name.removeprefix(name).removeprefix("-")
        scores.setdefault(split, {})[name] = score
    return scores


def read_relevance(folder: Path, config: DictConfig) -> dict[str, Any]:
    """The relevance metrics of the configuration's benchmark, or of the only one if it names none."""
    split = config.evaluate.get("split")
    paths = sorted(folder.glob("*/metrics.json"))
    choice = config.evaluate.get("relevance")
    if choice:
        # explain/<benchmark> holds the benchmark's own split, explain/<benchmark>-<split> another one.
        name = choice_name(choice)
        paths = [path for path in paths if path.parent.name in (name, f"{name}-{split}")]
    contents = [read_json(path) for path in paths]
    found = [content for content in contents if split in (None, content.get("split"))]
    return found[0] if len(found) == 1 else {}


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves that a report shows, by name: losses from `metrics.jsonl`, which has every step, and the speed from
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

    # Loads as few images and tensors as possible (1 each), and all scalars (0).
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "tensors": 1, "scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag == SPEED]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def log_tail(folder: Path, recorded: Any) -> str:
    """The last lines that a run logged.

    Args:
        recorded: the lines in the sweep's ledger, if any.
    """
    if recorded:
        return recorded if isinstance(recorded, str) else "\n".join(map(str, recorded))
    for path in (folder.parent / "logs" / f"{folder.name}.log", folder / "train.log"):
        if path.is_file():
            return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    return ""
