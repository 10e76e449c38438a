"""Scores of trained image-blind models, to be printed beside those of models that see."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import GROUPS, choices, load_choice, load_config, parse_value, read_config
from prism_deco.config.schema import Config
from prism_deco.errors import UsageError
from prism_deco.files import write_json
from prism_deco.training.manifest import config_hash

REFERENCE = Path(__file__).parent.parent / "assets" / "reference" / "blind.json"

IMAGE_ONLY = {
    ("recipe", key)
    for key in ("blind", "num_tokens", "projector_lr", "token_scale", "standardise_features", "resize", "start_from")
}
"""Settings that a blind model does not feel."""

PLANNING = {("data", "statistics")}
"""Settings that no model feels."""


def settings_key(config: DictConfig) -> str:
    """Identifies the settings under which a model and its blind twin are comparable: the LLM, the data
    and the recipe. What only concerns the image (backbone, projector, their learning rate and token
    count) is left out, since a blind model does not use it; so is what has the schema's default, so that
    a setting added to the schema later does not disown the references recorded before."""
    content = OmegaConf.to_container(config, resolve=True)
    defaults = OmegaConf.to_container(OmegaConf.structured(Config), throw_on_missing=False)
    assert isinstance(content, dict) and isinstance(defaults, dict)
    shared = {}
    for group in ("llm", "data", "recipe"):
        own = {key: value for key, value in content[group].items() if value != defaults[group].get(key, ...)}
        shared[group] = {key: value for key, value in own.items() if (group, key) not in IMAGE_ONLY | PLANNING}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def record(run: Path, path: Path) -> dict[str, Any]:
    """Adds the scores of a finished blind run to a reference file; returns the entry, with the command that trains the
    same run again.

    Raises:
        UsageError: the run was not trained with `recipe.blind=true`, or has not been scored.
    """
    config = read_config(run / "config.yaml")
    if not config.recipe.blind:
        raise UsageError(f"{run} was trained with its images: train its twin with recipe.blind=true.")
    scores: dict[str, dict[str, float]] = {}
    for file in sorted((run / "eval").glob("*/metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        benchmark = metrics["benchmark"]
        # eval/<benchmark> holds the benchmark's own split, eval/<benchmark>-<split> another one.
        split = file.parent.name.removeprefix(benchmark).removeprefix("-") or _own_split(benchmark)
        scores.setdefault(split, {})[benchmark] = round(metrics["metrics"][metrics["primary"]], 2)
    if not scores:
        raise UsageError(f"{run} has no scores: run prism-deco evaluate {run} benchmark=mini")
    entry = {
        "llm": config.llm.name,
        "data": config.data.name,
        "recipe": config.recipe.name,
        "seed": config.seed,
        "command": shlex.join(["prism-deco", "train", *_overrides(config)]),
        "config_hash": config_hash(config),
        "scores": scores,
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, known | {settings_key(config): entry})
    return entry


def blind_scores(config: DictConfig, split: str | None) -> dict[str, float] | None:
    """Primary score by benchmark of the blind twin of these settings; None where none was recorded.

    Args:
        split: the split scored; None is each benchmark's own.
    """
    if not REFERENCE.is_file():
        return None
    entry = json.loads(REFERENCE.read_text(encoding="utf-8")).get(settings_key(config))
    if entry is None or split is not None:
        return entry and entry["scores"].get(split)
    recorded = [(name, part) for part, values in entry["scores"].items() for name in values]
    return {name: entry["scores"][part][name] for name, part in recorded if part == _own_split(name)} or None


def _own_split(benchmark: str) -> str:
    """The split that a benchmark is scored on when none is asked for; `own` where it has no splits."""
    try:
        return load_choice("benchmark", benchmark).get("split") or "own"
    except UsageError:  # the user's own YAML, which its name alone does not find
        return "own"


def _overrides(config: DictConfig) -> list[str]:
    """The choices of a run, and what it has changed of them. Of a YAML of the user's own only the name is known."""
    names = {group: str(config[group].name) for group in GROUPS}
    shipped = [f"{group}={name}" for group, name in names.items() if name in choices(group)]
    own = [f"{group}={name}.yaml" for group, name in names.items() if name not in choices(group)]
    default = dict(_leaves(OmegaConf.to_container(load_config(shipped), resolve=True)))
    elsewhere = ("run_id", "runs_dir", *(f"{text.partition('=')[0]}." for text in own))
    values = _leaves(OmegaConf.to_container(config, resolve=True))
    changed = [(key, value) for key, value in values if value != default.get(key, ...)]
    return shipped + own + [f"{key}={_text(key, value)}" for key, value in changed if not key.startswith(elsewhere)]


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(key: str, value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) and parse_value(key, value) == value else json.dumps(value)
