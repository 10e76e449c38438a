"""What must agree between the cells of one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prism_deco.report.cells import RunCell, SeedGroup
from prism_deco.report.compute import same_compute

_RUN: dict[str, Callable[[RunCell], Any]] = {
    "training data (data_hash)": lambda cell: cell.manifest["data_hash"][:12],
}
_BUDGET: dict[str, Callable[[RunCell], Any]] = {
    "steps": lambda cell: cell.manifest["steps"],
    "samples": lambda cell: cell.manifest["samples"],
}
_SCORE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "questions (data_hash)": lambda content: content["data_hash"][:12],
    "prompts (prompt_hash)": lambda content: content["prompt_hash"][:12],
    "longest answer (max_new_tokens)": lambda content: (content["decoding"] or {}).get("max_new_tokens"),
}


def disagreements(groups: Sequence[SeedGroup], split: str) -> list[str]:
    """What differs between cells that should only differ in their labels, each as one sentence.

    In a whole table the training data must be the same, and either the number of steps and of samples or their
    compute (see `compute`); each line must have the same seeds (planned ones count: a seed that is still training is
    missing, not different), and each benchmark must have asked the same questions with the same prompts and answer
    length. Within a row the number of visual tokens must be the same too, except for an uncompressed projector (as
    many tokens as patches), to which a row is compared; so must the micro-batches where the loss is a mean over them.
    """
    cells = [cell for group in groups for cell in group.cells]
    trained = [cell for cell in cells if cell.manifest]
    found = [_spread(name, trained, read) for name, read in _RUN.items()]
    found += _budgets(trained)
    for row in dict.fromkeys(cell.row for cell in trained):
        compressed = [cell for cell in trained if cell.row == row and cell.compressed]
        found.append(_spread(f"visual tokens in row {row}", compressed, lambda cell: cell.tokens))
        sizes = [(cell.id, _micro_batch(cell)) for cell in trained if cell.row == row and _averages(cell)]
        found.append(_sentence(f"micro-batches, over which the loss is a mean, in row {row}", sizes))
    for benchmark in dict.fromkeys(name for cell in trained for name in cell.scores.get(split, {})):
        scored = [cell for cell in trained if benchmark in cell.scores.get(split, {})]
        for name, read in _SCORE.items():
            values = [(cell.id, read(cell.scores[split][benchmark].content)) for cell in scored]
            found.append(_sentence(f"{benchmark}: {name}", values))
    seeds = {group.name: ", ".join(sorted(cell.seed for cell in group.cells)) for group in groups}
    found.append(_sentence("seeds", seeds.items()))
    return [sentence for sentence in found if sentence]


def refusal(title: str, sentences: Sequence[str]) -> str:
    """The message of an error."""
    return (
        f"The cells of {title} saw different things and cannot be compared: {' '.join(sentences)} "
        "Report them separately, or use --mixed to put them into one table."
    )


def _averages(cell: RunCell) -> bool:
    """Whether the loss depends on the records of a forward pass."""
    return cell.config is not None and cell.config.recipe.loss == "micro_batch_mean"


def _micro_batch(cell: RunCell) -> str:
    """Records of a forward pass (x devices)."""
    assert cell.config is not None
    return f"{cell.config.recipe.micro_batch_size} (x {cell.manifest.get('devices', 1)})"


def _budgets(cells: Sequence[RunCell]) -> list[str]:
    sentences = [_spread(name, cells, read) for name, read in _BUDGET.items()]
    return sentences if any(sentences) and not same_compute(cells) else []


def _spread(name: str, cells: Sequence[RunCell], read: Callable[[RunCell], Any]) -> str:
    return _sentence(name, ((cell.id, read(cell)) for cell in cells))


def _sentence(name: str, values: Iterable[tuple[str, Any]]) -> str:
    """Names the values and who has them; empty where there is one value only."""
    owners: dict[Any, list[str]] = {}
    for owner, value in values:
        owners.setdefault(value, []).append(owner)
    if len(owners) < 2:
        return ""
    return f"{name}: {'; '.join(f'{value} in {_few(members)}' for value, members in owners.items())}."


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
