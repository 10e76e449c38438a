"""Scores of trained image-blind models, to be printed beside those of models that see."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import read_config
from prism_deco.schema import Config

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


def record(run: Path, path: Path = REFERENCE) -> dict[str, Any]:
    """Adds the scores of a finished blind run to the reference file; returns the entry.

    Raises:
        ValueError: the run was not trained with `recipe.blind=true`, or has not been scored.
    """
    config = read_config(run / "config.yaml")
    if not config.recipe.blind:
        raise ValueError(f"{run} was trained with its images: train its twin with recipe.blind=true.")
    scores: dict[str, dict[str, float]] = {}
    for file in sorted((run / "eval").glob("*/metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        # eval/<benchmark> holds the benchmark's own split, eval/<benchmark>-<split> another one.
        split = file.parent.name.removeprefix(metrics["benchmark"]).removeprefix("-") or "val"
        scores.setdefault(split, {})[metrics["benchmark"]] = round(metrics["metrics"][metrics["primary"]], 2)
    if not scores:
        raise ValueError(f"{run} has no scores: run prism-deco evaluate {run} benchmark=mini")
    entry = {
        "llm": config.llm.name,
        "data": config.data.name,
        "recipe": config.recipe.name,
        "seed": config.seed,
        "command": f"prism-deco train llm={config.llm.name} recipe.blind=true seed={config.seed}",
        "scores": scores,
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {settings_key(config): entry}, indent=2) + "\n", encoding="utf-8")
    return entry


def blind_scores(config: DictConfig, split: str | None) -> dict[str, float] | None:
    """Primary score by benchmark of the blind twin of these settings; None where none was recorded.

    Args:
        split: the split scored; None is the benchmarks' own (`val` in miniature).
    """
    if not REFERENCE.is_file():
        return None
    entry = json.loads(REFERENCE.read_text(encoding="utf-8")).get(settings_key(config), {})
    return entry.get("scores", {}).get(split or "val")
