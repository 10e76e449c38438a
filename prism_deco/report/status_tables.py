"""Paragraphs and tables about the state of the cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report.cells import VAL_LOSS, RunCell
from prism_deco.report.tabular import MISSING, Field, Table, format_number, records_table


def about(cells: Sequence[RunCell]) -> list[str]:
    """A paragraph about the trained models: when, on what, and by which version."""
    trained = _by_run(cell for cell in cells if cell.manifest)
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
    # Several days, one, or none, if no cell recorded its start.
    when = f" between {days[0]} and {days[-1]}" if len(days) > 1 else "".join(f" on {day}" for day in days)
    return [
        f"{models} of {params} parameters (vision backbone {names('backbone')}, LLM {names('llm')}), trained{when} "
        f"with prism_deco {versions} for {steps} steps on {samples} records of {names('data')}, recipe "
        f"{names('recipe')}."
    ]


def _by_run(cells: Iterable[RunCell]) -> list[RunCell]:
    """One cell per run: a run that was scored with several numbers of visual tokens has several."""
    return list({cell.folder: cell for cell in cells}.values())


def _span(values: Sequence[int]) -> str:
    least = f"{min(values):,}"
    most = f"{max(values):,}"
    return least if least == most else f"{least} to {most}"


def notes(cells: Sequence[RunCell], split: str, others: Sequence[str]) -> str:
    """A paragraph about the state of the cells and the split shown.

    Args:
        split: the split shown; "" is the benchmarks' own.
        others: other scored splits.
    """
    if not cells:
        return (
            "There are no cells. Nothing was planned or run here yet; start with prism-deco sweep or prism-deco train."
        )
    found = [_progress(cells), f"Split: {split or 'the benchmarks’ own'}."]  # noqa: RUF001
    if others:
        found.append(f"Also scored: {', '.join(others)} (--split).")
    machines = {str(cell.manifest.get("machine")) for cell in cells if cell.manifest}
    if len(machines) > 1:
        found.append(f"The cells were trained on {len(machines)} kinds of machine; their times cannot be compared.")
    return " ".join(found)


def _progress(cells: Sequence[RunCell]) -> str:
    """The number of cells in each state, in words."""
    cells = _by_run(cells)
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
            Field(cell.reason or ("not scored yet" if cell.state == "trained" else MISSING)),
        ]
        for cell in cells
    ]
    return Table("Unfinished cells", ["cell", "state", "attempts", "reason"], rows, words=True)


def cells_table(cells: Sequence[RunCell]) -> Table:
    """All cells, with the settings and the cost of their training."""
    caption = (
        "lm: the part of the LLM that was trained. start from: the run whose projector was loaded. lr: peak learning "
        "rate of the LLM or its adapters. projector lr: peak learning rate of the projector."
    )
    return records_table("Cells", [cell_record(cell) for cell in cells], caption)


def cell_record(cell: RunCell) -> dict[str, Any]:
    """The line of a cell in `cells.csv`."""
    config = cell.config
    manifest = cell.manifest
    recipe = config.recipe if config is not None else {}
    start = recipe.get("start_from")
    lr = recipe.get("lr")
    step_seconds = cell.step_seconds
    return {
        "cell": cell.id,
        "state": cell.state,
        "row": cell.row,
        "projector": f"{cell.variant} (blind)" if cell.blind else cell.variant,
        "seed": cell.seed,
        "recipe": recipe.get("name"),
        "data": config.data.name if config is not None else None,
        "lm": recipe.get("lm"),
        "start_from": Path(start).name if start else None,
        "lr": lr,
        "projector_lr": lr if recipe.get("projector_lr") is None else recipe.get("projector_lr"),
        "visual_tokens": cell.tokens,
        "trained_parameters": manifest["params"]["trained"] if manifest else None,
        "steps": manifest.get("steps"),
        "samples": manifest.get("samples"),
        "bad_images": manifest.get("bad_images"),
        "code_version": manifest.get("code_version"),
        "data_hash": manifest["data_hash"][:12] if manifest else None,
        "step_seconds": format_number(step_seconds, 3) if step_seconds is not None else None,
        "seconds": cell.seconds,
        "first_token_seconds": format_number(cell.first_token_seconds, 4) if cell.first_token_seconds else None,
    }


def run_records(cells: Sequence[RunCell], split: str) -> list[dict[str, Any]]:
    """A record per run and measure, for CSV. Measures are the last validation loss of a finished run (nats per token),
    the primary metrics of the benchmarks (in their own units), and the means over relevance maps (fractions of one, or
    of the grid's side).
    """
    found = []
    for cell in cells:
        about = {"cell": cell.id, "part": cell.part or None, "row": cell.row, "projector": cell.variant}
        about |= {"blind": cell.blind, "seed": cell.seed}
        curve = cell.curves.get(VAL_LOSS)
        if cell.manifest and curve:
            found.append(about | {"split": "val", "measure": VAL_LOSS, "variant": None, "value": curve[-1][1]})
        about |= {"split": split or None}
        for name, score in cell.scores.get(split, {}).items():
            found.append(about | {"measure": name, "variant": score.variant or None, "value": score.value})
        maps = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {})
        values = {f"relevance {key}": value["mean"] for key, value in maps.items() if isinstance(value, dict)}
        found += [about | {"measure": name, "variant": None, "value": value} for name, value in values.items()]
    return found
