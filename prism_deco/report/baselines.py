"""What scores without seeing the image: the best constant answer, and models trained without their images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from prism_deco.errors import UsageError
from prism_deco.evaluation import Benchmark, Prediction, build_benchmark, load_predictions
from prism_deco.evaluation import chance as constant_chance
from prism_deco.report.blind import blind_scores, settings_key
from prism_deco.report.cells import RunCell, Score

log = logging.getLogger(__name__)

MOST_QUESTIONS = 10_000
"""Above that, chance is left out: grading every candidate would take minutes."""


def main_predictions(benchmark: Benchmark, path: Path) -> list[Prediction]:
    """The predictions that make the primary metric: those of the benchmark's first variant."""
    asked = [(benchmark.variant_of(prediction), prediction) for prediction in load_predictions(path)]
    used = {variant for variant, _ in asked}
    first = next(variant for variant in (*benchmark.variants, *used) if variant in used)
    return [prediction for variant, prediction in asked if variant == first]


def chance(score: Score) -> float | None:
    """The best constant answer to the questions that were asked; None where that is not known or takes too long."""
    if int(score.content["n"]) > MOST_QUESTIONS:
        return None
    try:
        return constant_chance(build_benchmark(score.choice), load_predictions(score.folder / "predictions.jsonl"))
    except UsageError as error:
        log.warning("%s: no chance level: %s", score.folder, error)
        return None


def blind(cells: Sequence[RunCell], blind_cells: Iterable[RunCell], split: str) -> dict[str, float]:
    """Scores by benchmark of the image-blind baseline of these cells: of the study's own, else the recorded one.

    Args:
        cells: of one row; the result is empty where their settings differ in what a blind model depends on.
    """
    configs = [cell.config for cell in cells if cell.config is not None]
    keys = {settings_key(config) for config in configs}
    if len(keys) != 1:
        return {}
    own = [cell for cell in blind_cells if cell.config is not None and settings_key(cell.config) in keys]
    return mean_scores(own, split) or blind_scores(configs[0], split or None) or {}


def mean_scores(cells: Iterable[RunCell], split: str) -> dict[str, float]:
    """The means of all cells that have a score, by benchmark."""
    values: dict[str, list[float]] = {}
    for cell in cells:
        for benchmark, score in cell.scores.get(split, {}).items():
            values.setdefault(benchmark, []).append(score.value)
    return {benchmark: fmean(scores) for benchmark, scores in values.items()}
