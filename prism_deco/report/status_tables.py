"""What became of the cells, in words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report.cells import VAL_LOSS, RunCell
from prism_deco.report.tabular import MISSING, Field, Table, format_number, records_table

_MEANING = {"trained": "not scored yet"}


MOST_CURVES = 40
"""Above that many cells, curves are drawn of unfinished cells only."""


def about(cells: Sequence[RunCell]) -> list[str]:
    """A paragraph on which models were trained, when, and by which version."""
    trained = [cell for cell in cells if cell.manifest]
    if not trained:
        return []

    def names(group: str) -> str:
        return ", ".join(dict.fromkeys(str(cell.config[group].name) for cell in trained if cell.config is not None))

    models = f"{len(trained)} {'model' if len(trained) == 1 else 'models'}"
    params = _span([cell.manifest["params"]["total"] for cell in trained])
    steps = _span([cell.manifest["steps"] for cell in trained])
    samples = _span([cell.manifest["samples"] for cell in trained])
    versions = ", ".join(dict.fromkeys(str(cell.manifest.get("code_version", "?")) for cell in trained))
    days = sorted({datetime.fromtimestamp(cell.started, UTC).date() for cell in trained if cell.started})
    when = f" between {days[0]} and {days[-1]}" if len(days) > 1 else "".join(f" on {day}" for day in days)
    return [
        f"{models} of {params} parameters (vision backbone {names('backbone')}, LLM {names('llm')}), trained{when} "
        f"with prism_deco {versions} for {steps} steps on {samples} records of {names('data')}, recipe "
        f"{names('recipe')}."
    ]


def _span(values: Sequence[int]) -> str:
    least = f"{min(values):,}"
    most = f"{max(values):,}"
    return least if least == most else f"{least} to {most}"


def notes(cells: Sequence[RunCell], split: str, others: Sequence[str]) -> str:
    """A paragraph on the state of the cells, and on what is shown of them.

    Args:
        split: that is shown; "" is the benchmarks' own.
        others: that were scored as well.
    """
    if not cells:
        return (
            "There are no cells. Nothing was planned or run here yet: start with prism-deco sweep or prism-deco train."
        )
    found = [_progress(cells), f"Split: {split or 'the benchmarks’ own'}."]  # noqa: RUF001
    if others:
        found.append(f"Also scored: {', '.join(others)} (--split).")
    if len(cells) > MOST_CURVES:
        found.append("Curves of single cells are those of unfinished ones.")
    machines = {str(cell.manifest.get("machine")) for cell in cells if cell.manifest}
    if len(machines) > 1:
        found.append(f"The cells were trained on {len(machines)} kinds of machine: their times do not compare.")
    return " ".join(found)


def _progress(cells: Sequence[RunCell]) -> str:
    """How many cells are in which state, in words."""
    states = Counter(cell.state for cell in cells)
    others = [f"{count} {state}" for state, count in states.items() if state != "done"]
    return ", ".join([f"{states['done']} of {len(cells)} cells done", *others]) + "."


def unfinished_table(cells: Sequence[RunCell]) -> Table:
    """Unfinished cells with the reason."""
    rows = [
        [
            Field(cell.id),
            Field(cell.state),
            Field(MISSING if cell.attempts is None else str(cell.attempts)),
            Field(cell.reason or _MEANING.get(cell.state, MISSING)),
        ]
        for cell in cells
    ]
    return Table("Unfinished cells", ["cell", "state", "attempts", "reason"], rows)


def cells_table(cells: Sequence[RunCell]) -> Table:
    """Every cell with what it was trained on."""
    caption = (
        "lm: what was trained of the LLM. start from: the run whose projector was loaded. lr, projector lr: peak "
        "learning rates of what was trained of the LLM (its adapters under LoRA), and of the projector."
    )
    return records_table("Cells", cell_records(cells), caption)


def cell_records(cells: Sequence[RunCell]) -> list[dict[str, Any]]:
    """A record per cell, for CSV."""
    return [dict(zip(_COLUMNS, _values(cell), strict=True)) for cell in cells]


_MANIFEST = ("steps", "samples", "bad_images", "code_version")
_COLUMNS = ("cell", "state", "row", "projector", "seed", "recipe", "data", "lm", "start_from", "lr", "projector_lr")
_COLUMNS += ("visual_tokens", "trained_parameters", *_MANIFEST, "data_hash", "step_seconds", "seconds")


def _values(cell: RunCell) -> list[Any]:
    manifest = cell.manifest
    config = cell.config
    time = cell.step_seconds
    return [
        cell.id,
        cell.state,
        cell.row,
        f"{cell.variant} (blind)" if cell.blind else cell.variant,
        cell.seed,
        str(config.recipe.name) if config is not None else None,
        str(config.data.name) if config is not None else None,
        *_learning(config),
        cell.tokens,
        manifest["params"]["trained"] if manifest else None,
        *(manifest.get(name) for name in _MANIFEST),
        manifest["data_hash"][:12] if manifest else None,
        format_number(time, 3) if time is not None else None,
        cell.seconds,
    ]


def _learning(config: DictConfig | None) -> list[Any]:
    """What is trained of the LLM, the name of the run that was started from, and the learning rates."""
    if config is None:
        return [None] * 4
    lm, start, lr, own = (config.recipe.get(key) for key in ("lm", "start_from", "lr", "projector_lr"))
    return [lm, Path(start).name if start else None, lr, lr if own is None else own]


def run_records(cells: Sequence[RunCell], split: str) -> list[dict[str, Any]]:
    """A record per run and measure, for CSV, from which all means, intervals and tests of a report follow: the last
    validation loss of a finished run (nats per token), primary metrics of benchmarks (in their own units) and mean
    numbers of the relevance maps (fractions of one, or of the grid's side).
    """
    found = []
    for cell in cells:
        about = {"cell": cell.id, "part": cell.part or None, "row": cell.row, "projector": cell.variant}
        about |= {"blind": cell.blind, "seed": cell.seed}
        curve = cell.curves.get(VAL_LOSS)
        if cell.manifest and curve:
            found.append(about | {"split": "val", "measure": VAL_LOSS, "value": curve[-1][1]})
        values = {name: score.value for name, score in cell.scores.get(split, {}).items()}
        maps = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {})
        values |= {f"relevance {key}": value["mean"] for key, value in maps.items() if isinstance(value, dict)}
        found += [about | {"split": split or None, "measure": name, "value": value} for name, value in values.items()]
    return found
