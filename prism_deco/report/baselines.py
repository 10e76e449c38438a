"""Baselines that do not see the image: the best constant answer, and models trained without images."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import load_choice
from prism_deco.config.schema import Config
from prism_deco.errors import UsageError
from prism_deco.evaluation import Benchmark, Prediction, build_benchmark, load_predictions
from prism_deco.evaluation import chance as constant_chance
from prism_deco.report.cells import RunCell, Score

log = logging.getLogger(__name__)

REFERENCE = Path(__file__).parent.parent / "assets" / "reference" / "blind.json"

IGNORED = (
    "data.num_workers",
    "data.statistics",
    "recipe.blind",
    "recipe.num_tokens",
    "recipe.projector_init",
    "recipe.projector_seed",
    "recipe.projector_lr",
    "recipe.token_scale",
    "recipe.standardise_features",
    "recipe.resize",
    "recipe.start_from",
)
"""Settings that do not change an image-blind model."""

MOST_QUESTIONS = 10_000
"""Chance is not computed for more questions than this: grading every candidate answer would take minutes."""


def is_of_harness(score: Score) -> bool:
    """Whether another harness, such as lmms-eval, asked the questions and scored the answers."""
    return bool((score.content["decoding"] or {}).get("harness"))


def benchmark_of(score: Score) -> Benchmark:
    """The benchmark, with the variants that were scored."""
    variants = score.content.get("variants")
    return build_benchmark(score.choice, **({"variants": variants} if variants else {}))


def main_predictions(benchmark: Benchmark, path: Path) -> list[Prediction]:
    """The predictions behind the primary metric: those of the benchmark's first variant."""
    asked = [(benchmark.variant_of(prediction), prediction) for prediction in load_predictions(path)]
    used = {variant for variant, _ in asked}
    # The first of the benchmark's variants that was asked; if none was, a variant that only the file knows.
    first = next(variant for variant in (*benchmark.variants, *used) if variant in used)
    return [prediction for variant, prediction in asked if variant == first]


def chance(score: Score) -> float | None:
    """Score of the best constant answer to the questions asked; None if it is unknown or would take too long."""
    if int(score.content["n"]) > MOST_QUESTIONS or is_of_harness(score):
        return None
    try:
        return constant_chance(benchmark_of(score), load_predictions(score.folder / "predictions.jsonl"))
    except UsageError as error:
        log.warning("%s: no chance level: %s", score.folder, error)
        return None


def blind(cells: Sequence[RunCell], blind_cells: Iterable[RunCell], split: str) -> dict[str, float]:
    """Scores by benchmark of the image-blind baseline of these cells: the study's own, or else the recorded one.

    Args:
        cells: of one row; the result is empty if they differ in settings that a blind model depends on.
    """
    configs = [cell.config for cell in cells if cell.config is not None]
    keys = {settings_key(config) for config in configs}
    if len(keys) != 1:
        return {}
    own = [cell for cell in blind_cells if cell.config is not None and settings_key(cell.config) in keys]
    return mean_scores(own, split) or blind_scores(configs[0], split or None) or {}


def mean_scores(cells: Iterable[RunCell], split: str) -> dict[str, float]:
    """The mean score by benchmark, over the cells that have one."""
    values: dict[str, list[float]] = {}
    for cell in cells:
        for benchmark, score in cell.scores.get(split, {}).items():
            values.setdefault(benchmark, []).append(score.value)
    return {benchmark: fmean(scores) for benchmark, scores in values.items()}


def settings_key(config: DictConfig) -> str:
    """Hash of the settings that a model must share with its image-blind baseline: the LLM, the data and the recipe.

    Settings that only concern the image (backbone, projector, its learning rate and token count) are left out, since a
    blind model does not use them. So are settings at the schema's default, so that references recorded before a
    setting existed stay valid.
    """
    content = OmegaConf.to_container(config, resolve=True)
    defaults = OmegaConf.to_container(OmegaConf.structured(Config), throw_on_missing=False)
    assert isinstance(content, dict) and isinstance(defaults, dict)
    shared = {}
    for group in ("llm", "data", "recipe"):
        # `...` equals no value, so keys that the schema does not list are kept.
        own = {key: value for key, value in content[group].items() if value != defaults[group].get(key, ...)}
        shared[group] = {key: value for key, value in own.items() if f"{group}.{key}" not in IGNORED}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def blind_scores(config: DictConfig, split: str | None) -> dict[str, float] | None:
    """Recorded primary scores by benchmark of the image-blind baseline of these settings; None if there are none.

    Args:
        split: the split scored; None is each benchmark's own.
    """
    if not REFERENCE.is_file():  # while it is recorded anew
        return None
    entry = json.loads(REFERENCE.read_text(encoding="utf-8")).get(settings_key(config), {"scores": {}})
    if split is not None:
        return entry["scores"].get(split)
    found: dict[str, float] = {}
    for part, values in entry["scores"].items():
        found |= {name: value for name, value in values.items() if part == _own_split(name)}
    return found or None


def _own_split(benchmark: str) -> str:
    """The default split of a benchmark; `own` where it has no splits."""
    try:
        return load_choice("benchmark", benchmark).get("split") or "own"
    except UsageError:  # the benchmark of a user's own YAML cannot be found by its name alone
        return "own"
