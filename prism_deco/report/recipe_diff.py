"""How a cell's settings differ from those of the paper's authors."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from prism_deco.config import choices, flat, load_choice, load_config, value_text
from prism_deco.config.values import flatten
from prism_deco.report import paper
from prism_deco.report.cells import RunCell
from prism_deco.report.tabular import Field, Table

PASSES = "records per forward pass x devices"

_LEFT_OUT = (
    "backbone.name", "backbone.image_size", "backbone.weights", "backbone.file_gb",
    "projector.name", "projector.num_tokens", "projector.weights",
    "llm.name", "llm.weights", "llm.revision", "llm.tokenizer", "llm.attention", "llm.prompt_sets",
    "recipe.stages", "recipe.start_from", "recipe.num_tokens", "recipe.micro_batch_size", "recipe.packing",
    "recipe.max_logits",
)  # fmt: skip
"""Keys that are not compared: tables show them already, or they do not affect the trained model."""

_OTHERS = ("data.name", "data.limit", "data.val_fraction", "data.draft_jpeg", "trainer.precision")
"""Keys of other groups that affect the trained model."""


class Departure(NamedTuple):
    """A setting in which we depart from the authors."""

    setting: str
    ours: str
    authors: str


def departures(cell: RunCell, table: int) -> list[Departure]:
    """The settings that affect training in which a cell differs from the authors' run of the same tower, projector and
    LLM.

    Keys that an earlier version's configuration lacks are no difference; neither is a value interpolated from another
    key. Library versions are those of the manifest, or of this environment before there is one.

    Args:
        table: the paper's table that the cell belongs to.
    """
    config = cell.config
    if config is None:
        return []
    authors = paper.AUTHORS[table]
    ours = flat(config)
    names = {group: str(config[group].name) for group in ("backbone", "projector", "llm")}
    overrides = [f"{group}={name}" for group, name in names.items() if name in choices(group)]
    theirs, references = _composed((*authors.overrides, *overrides))
    if ours.get("recipe.prompt_set") != theirs.get("recipe.prompt_set"):
        # Compare the LLM's keys under our prompt set, so that only the set itself is reported.
        own_set = f"recipe.prompt_set={value_text('recipe.prompt_set', ours.get('recipe.prompt_set'))}"
        alike, _ = _composed((*authors.overrides, *overrides, own_set))
        theirs = theirs | {key: value for key, value in alike.items() if key.startswith("llm.")}
    # The type of gradient reduction matters only with FSDP, and the seed only where the authors' is known.
    sharded = config.trainer.get("strategy") == "fsdp"
    others = (*_OTHERS, *(["trainer.reduce_dtype"] if sharded else []), *(["seed"] if authors.seed else []))
    found = []
    for key, value in ours.items():
        compared = key in others or (key.startswith(("recipe.", "backbone.", "projector.", "llm.")))
        if not compared or key in _LEFT_OUT or key not in theirs:
            continue
        # Where the authors' value is interpolated from another key, it should follow our value of that key: the
        # difference, if any, is reported at the other key.
        expected = ours.get(references.get(key, ""), theirs[key])
        if value != expected:
            found.append(Departure(key.removesuffix(".name"), _shown(key, value), _shown(key, expected)))
    found += _passes(cell, authors, theirs["recipe.micro_batch_size"])
    found += _starts(cell, authors)
    return found + _libraries(cell, authors)


def _passes(cell: RunCell, authors: paper.Authors, micro_batch_size: int) -> list[Departure]:
    assert cell.config is not None
    # A finished run knows its number of devices; before that, -1 stands for all of the machine's.
    devices = cell.manifest.get("devices") or cell.config.trainer.get("devices", 1)
    ours = f"{cell.config.recipe.micro_batch_size} x {devices if devices > 0 else 'all'}"
    theirs = f"{micro_batch_size} x {authors.devices}"
    return [Departure(PASSES, ours, theirs)] if ours != theirs else []


def _starts(cell: RunCell, authors: paper.Authors) -> list[Departure]:
    """Differences in what the training starts from."""
    assert cell.config is not None
    found = []
    before = _stage_before(authors.recipe)
    start = cell.config.recipe.get("start_from")
    if bool(start) != bool(before):
        theirs = f"a run of the stage {before}" if before else "null"
        found.append(Departure("recipe.start_from", Path(start).name if start else "null", theirs))
    projector = cell.config.projector
    if projector.name == "qformer" and not projector.get("weights"):
        found.append(Departure("projector.weights", "null", "BLIP-2's, or null with heads=64"))
    return found


def _libraries(cell: RunCell, authors: paper.Authors) -> list[Departure]:
    installed: Mapping[str, str] = cell.manifest.get("packages") or {
        name: importlib.metadata.version(name) for name in authors.packages
    }
    # Without the local part of a version: 2.1.0+cu121 is 2.1.0.
    versions = {name: installed.get(name, "?").partition("+")[0] for name in authors.packages}
    return [
        Departure(name, versions[name], theirs) for name, theirs in authors.packages.items() if versions[name] != theirs
    ]


def settings_records(cells: Iterable[RunCell], table: int) -> list[dict[str, str]]:
    """A record per cell and departure, for CSV."""
    return [{"cell": cell.id, **departure._asdict()} for cell in cells for departure in departures(cell, table)]


def settings_table(cells: Sequence[RunCell], table: int) -> Table | None:
    """The departures, each with the cells that have it; None if there are none."""
    known = [cell for cell in cells if cell.config is not None]
    owners: dict[Departure, list[str]] = {}
    for cell in known:
        for departure in departures(cell, table):
            owners.setdefault(departure, []).append(cell.id)
    if not owners:
        return None
    rows = []
    for departure, names in owners.items():
        who = f"all {len(known)}" if len(names) == len(known) > 1 else ", ".join(names)
        rows.append([*map(Field, departure), Field(who)])
    caption = (
        f"Compared with {' '.join(paper.AUTHORS[table].overrides)} on {paper.AUTHORS[table].devices} devices, composed "
        "for each cell's tower, projector and LLM. Without a finished run, libraries are those of this environment."
    )
    return Table(
        "Settings that differ from the authors'", ["setting", "ours", "authors", "cells"], rows, caption, words=True
    )


def recipes(cells: Iterable[RunCell]) -> str:
    """The recipes of the cells, as a sentence."""
    counts = Counter(str(cell.config.recipe.name) for cell in cells if cell.config is not None)
    sizes = {name: f"{name} ({count} cell{'s' * (count > 1)})" for name, count in counts.items()}
    return f"Recipe: {', '.join(sizes.values() if len(counts) > 1 else counts)}."


def _shown(key: str, value: Any) -> str:
    text = value_text(key, value)
    return text if len(text) <= 60 else "another" if isinstance(value, str) else f"{text[:57]}..."


@cache
def _composed(overrides: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values by key, and by key the target of each value that is an interpolation (`${recipe.num_tokens}`)."""
    config = load_config(overrides)
    written: Any = OmegaConf.to_container(config, resolve=False)
    targets = {}
    for key, value in flatten(written).items():
        if isinstance(value, str) and (match := re.fullmatch(r"\$\{(.+)\}", value)):
            targets[key] = match[1]
    return flat(config), targets


@cache
def _stage_before(recipe: str) -> str | None:
    """The stage that precedes this recipe in a recipe with stages; None if there is none."""
    for choice in choices("recipe"):
        stages = load_choice("recipe", choice).get("stages") or {}
        for before, stage in pairwise(stages):
            # A stage is a list of command-line arguments; the one that uses this recipe is the one looked for.
            if f"recipe={recipe}" in stages[stage]:
                return before
    return None
