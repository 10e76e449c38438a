"""Checks that the cells of one table can be compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_deco.config.registry import require_imported
from prism_deco.config.schema import Config
from prism_deco.errors import UsageError
from prism_deco.plan.estimate import estimate_run
from prism_deco.report.cells import RunCell, SeedGroup

log = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Largest relative difference in compute of two trainings that counts as equal: steps are whole numbers."""

_PLANNED = ["backbone", "projector", "llm", "data", "recipe", "trainer", "plugins"]
"""Keys on which the compute of a training depends."""

_SCORE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "questions (data_hash)": lambda content: content["data_hash"][:12],
    "prompts (prompt_hash)": lambda content: content["prompt_hash"][:12],
    "variants": lambda content: ", ".join(content.get("variants", ["unknown"])),
    "longest answer (max_new_tokens)": lambda content: (content["decoding"] or {}).get("max_new_tokens"),
}


def disagreements(groups: Sequence[SeedGroup], split: str) -> list[str]:
    """Unwanted differences between the cells of a table, one sentence each.

    All cells must have the same training data, and either the same number of steps and samples or the same compute
    (see `same_compute`). All groups must have the same seeds; planned ones count, so a seed that is still training is
    no difference. Each benchmark must have the same questions, prompts and answer length. Within a row, the number of
    visual tokens must be the same, except for an uncompressed projector (as many tokens as patches), which is the row's
    reference; so must the micro-batches if the loss is a mean over them.
    """
    cells = [cell for group in groups for cell in group.cells]
    trained = [cell for cell in cells if cell.manifest]
    found = [_sentence("training data (data_hash)", ((cell.id, cell.manifest["data_hash"][:12]) for cell in trained))]
    steps = _sentence("steps", [(cell.id, cell.manifest["steps"]) for cell in trained])
    samples = _sentence("samples", [(cell.id, cell.manifest["samples"]) for cell in trained])
    # Refused too if the compute is unknown (None).
    if (steps or samples) and not same_compute(trained):
        found += [steps, samples]
    for row in dict.fromkeys(cell.row for cell in trained):
        members = [cell for cell in trained if cell.row == row]
        # Without the uncompressed cells, which are the row's reference.
        tokens = [(cell.id, cell.tokens) for cell in members if cell.compressed]
        found.append(_sentence(f"visual tokens in row {row}", tokens))
        sizes = []
        for cell in members:
            if cell.config is not None and cell.config.recipe.loss == "micro_batch_mean":
                size = f"{cell.config.recipe.micro_batch_size} (x {cell.manifest.get('devices', 1)})"
                sizes.append((cell.id, size))
        found.append(_sentence(f"micro-batches, over which the loss is a mean, in row {row}", sizes))
    for benchmark in dict.fromkeys(name for cell in trained for name in cell.scores.get(split, {})):
        scored = [cell for cell in trained if benchmark in cell.scores.get(split, {})]
        for name, read in _SCORE.items():
            values = [(cell.id, read(cell.scores[split][benchmark].content)) for cell in scored]
            found.append(_sentence(f"{benchmark}: {name}", values))
    # One value per group: the list of its seeds, as text.
    seeds = {group.name: ", ".join(sorted(cell.seed for cell in group.cells)) for group in groups}
    found.append(_sentence("seeds", seeds.items()))
    return [sentence for sentence in found if sentence]


def refusal(title: str, sentences: Sequence[str]) -> str:
    """The error message that lists these differences."""
    return (
        f"The cells of {title} cannot be compared, because they differ: {' '.join(sentences)} "
        "Report them separately, or use --mixed to put them into one table."
    )


def _sentence(name: str, values: Iterable[tuple[str, Any]]) -> str:
    """Lists each value with its owners; empty if all have the same value."""
    owners: dict[Any, list[str]] = {}
    for owner, value in values:
        owners.setdefault(value, []).append(owner)
    if len(owners) < 2:
        return ""
    return f"{name}: {'; '.join(f'{value} in {_few(members)}' for value, members in owners.items())}."


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def training_flops(cell: RunCell) -> float | None:
    """Floating-point operations of a finished training; None if they are unknown or it has not finished."""
    if not cell.manifest or cell.config is None:
        return None
    per_sample = _flops_per_sample(cell.config)
    return per_sample * cell.manifest["samples"] if per_sample is not None else None


def _flops_per_sample(config: DictConfig) -> float | None:
    """Mean FLOPs of training on one sample, as `prism-deco plan` counts them; None if the data have no `statistics` or
    the configuration is of another version."""
    if config.data.get("statistics") is None:
        return None  # the planner would read the data
    # Defaults for keys that a run of an earlier version does not have.
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(Config))
    chosen: Any = OmegaConf.merge({name: defaults[name] for name in _PLANNED}, OmegaConf.masked_copy(config, _PLANNED))
    # FLOPs per sample depend on neither; without them, most cells of a study hit the cache of `_planned_flops`.
    chosen.recipe.lr = 0.0
    chosen.recipe.max_steps = None
    return _planned_flops(OmegaConf.to_yaml(chosen, resolve=True))


@cache
def _planned_flops(text: str) -> float | None:
    """FLOPs per sample of a configuration, given as YAML so that it can be a cache key."""
    config: Any = OmegaConf.create(text)
    try:
        require_imported(config.plugins, Path("config.yaml"))
        needs = estimate_run(config).needs
    except (UsageError, OmegaConfBaseException) as error:
        log.warning("The compute of a step is not known: %s", error)
        return None
    # Without `max_steps`, the planned training sees every record `epochs` times.
    return needs.flops / needs.records / config.recipe.epochs if needs is not None else None


def same_compute(cells: Iterable[RunCell]) -> bool | None:
    """Whether the trainings had the same compute; None if it is unknown for one of them."""
    costs = [training_flops(cell) for cell in cells]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or not known:
        return None
    return max(known) <= (1 + TOLERANCE) * min(known)
