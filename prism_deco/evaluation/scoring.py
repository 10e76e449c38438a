"""Scores predictions without a model or the benchmark's files: the content of `metrics.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_deco.bootstrap import bootstrap_interval, combine_strata
from prism_deco.errors import UsageError
from prism_deco.evaluation.base import Benchmark
from prism_deco.evaluation.items import Item, Prediction
from prism_deco.evaluation.predictions import VARIANTS, load_predictions
from prism_deco.files import read_json


def summarise(
    benchmark: Benchmark, predictions: Sequence[Prediction], decoding: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of `metrics.json`.

    Args:
        predictions: graded, in canonical order.
        decoding: the settings that produced the answers; None if unknown.

    Returns:
        benchmark, variants (the first variant's metrics have plain names, those of the others a prefix),
        metrics{name: value} in the paper's unit (per cent, or MME's sum), primary (the name of the paper's metric),
        n (questions), invalid_rate (fraction 0..1 of the first variant's answers that could not be parsed), interval95
        of the primary metric, decoding, prompt_hash, data_hash.
    """
    variants = _by_variant(benchmark, predictions)
    first = next(iter(variants))
    strata = benchmark.strata(variants[first])
    benchmark.check_parts({name: len(values) for name, values in strata.items()}, "the predictions")
    metrics: dict[str, float] = {}
    for name, members in variants.items():
        own = benchmark.metrics(members) | {"invalid_rate": _invalid_rate(benchmark, members)}
        metrics |= own if name == first else {f"{name}/{metric}": value for metric, value in own.items()}
    return {
        "benchmark": benchmark.name,
        "variants": list(variants),
        "metrics": metrics,
        "primary": benchmark.primary,
        "n": len(variants[first]),
        "invalid_rate": metrics["invalid_rate"],
        "interval95": list(bootstrap_interval(strata, benchmark.combine)),
        "decoding": dict(decoding) if decoding is not None else None,
        "prompt_hash": hash_rows([p.question_id, p.prompt] for p in predictions),
        "data_hash": hash_rows([p.question_id, p.image, p.target] for p in predictions),
    }


def score_file(path: str | Path, benchmark: Benchmark, *, chosen: bool = True) -> dict[str, Any]:
    """Scores a predictions file again, from its outputs and targets alone; returns what `summarise` does.

    Args:
        chosen: whether the caller has chosen the benchmark's variants; otherwise they are only its YAML's defaults.
    """
    path = Path(path)
    predictions = load_predictions(path)
    recorded = path.with_name("decoding.json")
    decoding = read_json(recorded) if recorded.is_file() else {}
    asked = decoding.pop(VARIANTS, None)
    # Predictions of several variants name theirs in their targets; those of a single one do not.
    if asked is not None and len(asked) == 1 and asked[0] != benchmark.variants[0]:
        raise UsageError(
            f"{path} holds answers of the variant {asked[0]}, not {benchmark.variants[0]}: score it with "
            f"variants=[{asked[0]}]."
        )
    is_one = len(benchmark.VARIANTS) == 1 or (chosen and len(benchmark.variants) == 1)
    if asked is None and not is_one and not all("variant" in prediction.target for prediction in predictions):
        raise UsageError(
            f"{path} does not say which variant its answers are of, and there is no {recorded.name} next to it: name "
            f"it with variants=[{' or '.join(benchmark.VARIANTS)}], or copy {recorded.name} there, too."
        )
    for prediction in predictions:
        missing = [key for key in benchmark.target_keys if key not in prediction.target]
        if missing:
            raise UsageError(
                f"{path} cannot be scored as {benchmark.name}: its targets are not this benchmark's (that of question "
                f"{prediction.question_id} has no {' and no '.join(missing)})."
            )
    graded = [benchmark.grade(prediction) for prediction in predictions]
    return summarise(benchmark, graded, decoding or None)


def chance(benchmark: Benchmark, predictions: Sequence[Prediction]) -> float:
    """The primary metric of the best constant answer, which needs no image, on the questions of some predictions.

    The benchmark itself scores the candidates (`Benchmark.constants`), in the first variant that was asked.
    """
    first, asked = next(iter(_by_variant(benchmark, predictions).items()))
    scores = []
    for output in benchmark.constants([prediction.target for prediction in asked]):
        if benchmark.VARIANTS[first].likelihood:
            # A likelihood variant's output is probabilities by choice: here, all of it on one.
            output = json.dumps({choice: float(choice == output) for choice in benchmark.choices})
        graded = [benchmark.grade(replace(prediction, output=output)) for prediction in asked]
        scores.append(combine_strata(benchmark.strata(graded), benchmark.combine))
    return max(scores)


def predict(item: Item, output: str | None) -> Prediction:
    """An ungraded prediction."""
    return Prediction(item.question_id, item.image, item.prompt, output, None, item.target, 0.0)


def _by_variant(benchmark: Benchmark, predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by variant, the benchmark's variants first; variants without predictions are omitted."""
    variants: dict[str, list[Prediction]] = {name: [] for name in benchmark.variants}
    for prediction in predictions:
        variants.setdefault(benchmark.variant_of(prediction), []).append(prediction)
    return {name: members for name, members in variants.items() if members}


def _invalid_rate(benchmark: Benchmark, predictions: Sequence[Prediction]) -> float:
    return sum(p.output is None or benchmark.is_invalid(p) for p in predictions) / len(predictions)


def hash_rows(rows: Iterable[Any]) -> str:
    """SHA-256 of JSON rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
