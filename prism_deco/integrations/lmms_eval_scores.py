"""Runs tasks of lmms-eval and writes their scores as results of a run (`prism-deco evaluate RUN --lmms-eval TASKS`)."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from prism_deco.bootstrap import bootstrap_interval
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.evaluation.items import Prediction
from prism_deco.evaluation.predictions import FILE, write_predictions
from prism_deco.evaluation.scoring import hash_rows
from prism_deco.files import write_json

log = logging.getLogger(__name__)

NAME = "lmms-eval"


def score_tasks(
    run: Path, tasks: Sequence[str], out: Path, *, model_id: str, limit: int | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Runs tasks of lmms-eval, and writes `metrics.json` and `predictions.jsonl` of each to a folder of its name.

    lmms-eval downloads the data of a task from the Hugging Face hub.

    Args:
        tasks: names of lmms-eval's tasks or groups, or YAML files of tasks.
        model_id: hash of the run's weights, recorded in the results.
        limit: questions per task; None asks all.
        settings: further arguments of `PrismDeco`.

    Returns:
        The contents of the `metrics.json` files.
    """
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from tenacity import RetryError  # pyright: ignore[reportMissingImports]

    from prism_deco.integrations.lmms_eval import PrismDeco

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    # Tasks in YAML files are found by their folders and asked for by their names.
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in tasks]
    for name in names:
        if name not in manager.all_tasks:
            raise unknown(f"task of {NAME}", name, manager.all_tasks)
    model = PrismDeco(str(run), **settings)
    try:
        found = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            # Some tasks write files to this path.
            cli_args=Namespace(output_path=str(out / NAME), process_with_media=False),
        )
    except RetryError as error:  # a download failed several times
        cause = error.last_attempt.exception()
        if not isinstance(cause, OSError):
            raise
        raise UsageError(
            f"{NAME} cannot load the data of {', '.join(names)} ({cause}). Check the network, and the repository or "
            "files that the task names."
        ) from error
    computed_in = str(next(model.model.vlm.lm.parameters()).dtype).removeprefix("torch.")
    harness = f"{NAME} {version(NAME)}"
    more = {
        "variants": [harness],
        "decoding": {"strategy": "greedy", "dtype": computed_in, "model": model_id, "harness": harness},
    }
    results = []
    for name, samples in found["samples"].items():
        content = summarise(name, found["configs"][name], found["results"][name], samples, out / name)
        if content is not None:
            results.append(content | more)
            write_json(out / name / "metrics.json", results[-1])
    return results


def summarise(
    task: str, config: Mapping[str, Any], metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any] | None:
    """Writes `predictions.jsonl`; returns the content of `metrics.json`, except `variants` and `decoding`.

    The primary metric is the task's first one with a score for each question. Its interval is that of the mean over
    questions, shifted to the task's score if that is another mean, such as one over categories.

    Args:
        config: the task's configuration, with `metric_list`.
        metrics: "METRIC,FILTER" -> value, as aggregated by lmms-eval.
        samples: as logged by lmms-eval.

    Returns:
        None if no metric has a score for each question, so that there is no interval.
    """
    values = {key.partition(",")[0]: value for key, value in metrics.items() if isinstance(value, float | int)}
    # `else` runs if no metric leaves the loop by `break`.
    for primary in [str(metric["metric"]) for metric in config["metric_list"]]:
        scores = _scores([sample.get(primary) for sample in samples], values.get(primary))
        if scores:
            break
    else:
        log.warning("%s: left out of the results, since it does not score single questions: %s", task, values)
        return None
    low, high = bootstrap_interval({"all": [100 * score for score in scores]}, "mean")
    shift = 100 * (values[primary] - fmean(scores))
    percent = {
        name: 100 * value if 0 <= value <= 1 else value for name, value in values.items() if "_stderr" not in name
    }
    predictions = [
        Prediction(
            question_id=str(sample["doc_id"]),
            image=[],
            prompt=str(sample["arguments"][0]) if sample["arguments"] else "",
            output=str(sample["filtered_resps"][0]),
            answer=None,
            target={"answer": str(sample["target"])},
            score=score,
        )
        for sample, score in zip(samples, scores, strict=True)
    ]
    predictions.sort(key=lambda prediction: int(prediction.question_id))
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / FILE, predictions)
    empty = fmean(not prediction.text for prediction in predictions)
    return {
        "benchmark": task,
        "metrics": percent | {"invalid_rate": empty},
        "primary": primary,
        "n": len(predictions),
        "invalid_rate": empty,
        "interval95": [max(0.0, low + shift), min(100.0, high + shift)],
        "prompt_hash": hash_rows([p.question_id, p.prompt] for p in predictions),
        "data_hash": hash_rows([p.question_id, p.target] for p in predictions),
    }


def _scores(entries: Sequence[Any], value: float | None) -> list[float]:
    """The score 0..1 of each question; empty if a question has none.

    Args:
        entries: per question the score, or a record with it: under the key whose mean is `value`, or `score`.
        value: the task's score.
    """
    if value is None or not entries or not 0 <= value <= 1:
        return []
    columns = {"score": entries}
    if all(isinstance(entry, dict) for entry in entries):
        columns = {key: [entry.get(key) for entry in entries] for key in ("score", *entries[0])}
    usable = {key: column for key, column in columns.items() if all(map(_is_score, column))}
    for column in usable.values():
        if abs(fmean(column) - value) < 1e-6:
            return [float(score) for score in column]
    return [float(score) for score in usable.get("score", [])]


def _is_score(score: Any) -> bool:
    return isinstance(score, bool | int | float) and 0 <= score <= 1
