"""Scores of lmms-eval's tasks as results of a run. Samples have the forms that its tasks record (version 0.7.3)."""

import importlib.util
import json
import math
import sys
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest

from prism_deco.cli import main
from prism_deco.errors import UsageError
from prism_deco.integrations.lmms_eval_scores import score_tasks, summarise

RIGHT = [k % 3 > 0 for k in range(300)]
CATEGORIES = ["count", "text", "text"]


def _samples(record):
    """What lmms-eval logs of each question, with the metrics that `record` gives for it."""
    return [
        {
            "doc_id": k,
            "target": f"t{k}",
            "arguments": [f"Question {k}?", {"max_new_tokens": 4}],
            "filtered_resps": [f"answer {k}" if right else ""],
            **record(k, right),
        }
        for k, right in enumerate(RIGHT)
    ]


@pytest.mark.parametrize(
    ("names", "record", "aggregated", "primary"),
    [
        # docvqa_val, ocrbench, cv_bench: a number, a record with a score, a record with a flag
        (["anls"], lambda k, right: {"anls": 0.5 * right}, {"anls": 1 / 3}, "anls"),
        (
            ["ocrbench_accuracy"],
            lambda k, right: {"ocrbench_accuracy": {"question_type": "x", "score": int(right), "prediction": "p"}},
            {"ocrbench_accuracy": 2 / 3},
            "ocrbench_accuracy",
        ),
        (
            ["cv_bench_acc"],
            lambda k, right: {"cv_bench_acc": {"id": k, "is_correct": right, "task": "Count"}},
            {"cv_bench_acc": 2 / 3},
            "cv_bench_acc",
        ),
        # chartqa, mmstar: the metrics of parts are not those of all questions
        (
            ["human", "overall"],
            lambda k, right: {"overall": float(right)} | ({"human": float(right)} if k < 100 else {}),
            {"human": 0.66, "overall": 2 / 3},
            "overall",
        ),
        (
            ["count", "average"],
            lambda k, right: {
                name: {"question_id": k, "l2_category": CATEGORIES[k % 3], "score": float(right)}
                for name in (CATEGORIES[k % 3], "average")
            },
            {"count": 0.0, "average": 0.5},
            "average",
        ),
    ],
)
def test_metrics_of_the_tasks(tmp_path, names, record, aggregated, primary):
    config = {"metric_list": [{"metric": name} for name in names]}
    metrics = {f"{name},none": value for name, value in aggregated.items()} | {f"{names[0]}_stderr,none": "N/A"}
    found = summarise("task", config, metrics | {"alias": "task"}, _samples(record)[::-1], tmp_path / "task")
    assert found["primary"] == primary and found["n"] == 300
    assert found["metrics"] == pytest.approx(
        {name: 100 * value for name, value in aggregated.items()} | {"invalid_rate": 1 / 3}
    )
    lines = [json.loads(line) for line in (tmp_path / "task" / "predictions.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines]
    assert [line["question_id"] for line in lines] == [str(k) for k in range(300)]
    assert all(bool(score) == right for score, right in zip(scores, RIGHT, strict=True))
    assert lines[7]["prompt"] == "Question 7?" and lines[7]["output"] == "answer 7"
    # The normal approximation of the mean's interval, around the score.
    half = 196 * pstdev(scores) / math.sqrt(300)
    value = 100 * aggregated[primary]
    assert found["interval95"] == pytest.approx([value - half, value + half], abs=0.8)
    assert fmean(scores) == pytest.approx(aggregated[primary]) or primary == "average"


def test_a_task_without_scores_of_questions_is_left_out(tmp_path, caplog):
    samples = _samples(lambda k, right: {"mme_score": {"question_id": k, "category": "count"}})
    config = {"metric_list": [{"metric": "mme_score"}]}
    assert summarise("mme", config, {"mme_score,none": 1400.0}, samples, tmp_path / "mme") is None
    assert "left out of the results" in caplog.text and not (tmp_path / "mme").exists()


@pytest.mark.parametrize("count", [0, 300])
def test_a_flag_that_is_no_score_is_not_taken_for_one(tmp_path, count):
    """Neither is the metric's mean: the task averages over categories, or has no question."""
    samples = _samples(lambda k, right: {"accuracy": {"is_hard": k % 2, "answered": right}})[:count]
    config = {"metric_list": [{"metric": "accuracy"}]}
    assert summarise("task", config, {"accuracy,none": 0.4}, samples, tmp_path / "task") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lmms-eval", "ocrbench", "benchmark=pope"], "leave out benchmark="),
        (["--lmms-eval", "ocrbench", "split=val"], "leave out split"),
        (["--lmms-eval", "mmstar,pope"], "would replace the results of prism_deco's own benchmark: use benchmark=pope"),
        (["--lmms-eval", "ocrbench"], "lmms-eval is not installed"),
        (["--lmms-eval", "mmstar,nofile.yaml"], "--lmms-eval nofile.yaml: there is no such file"),
        *(
            (["--lmms-eval", "ocrbench", f"limit={limit}"], f"limit={limit} must be a whole number above 0")
            for limit in ("abc", "0", "-2", "0.5", "true", "[1]")
        ),
    ],
)
def test_what_the_command_refuses_before_anything_is_loaded(tmp_path, capsys, monkeypatch, arguments, message):
    installed = None if "installed" in message else True
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    assert main(["evaluate", str(tmp_path), *arguments]) == 2
    assert message.casefold() in " ".join(capsys.readouterr().err.split()).casefold()


class _RetryError(Exception):
    """As tenacity's, whose `last_attempt` is a future."""

    def __init__(self, cause):
        self.last_attempt = SimpleNamespace(exception=lambda: cause)


@pytest.mark.parametrize("cause", [ConnectionError("no network"), TypeError("a bug")])
def test_data_that_cannot_be_downloaded_is_named(tmp_path, monkeypatch, cause):
    def fail(**_):
        raise _RetryError(cause)

    stand_ins = {
        "lmms_eval": {},
        "lmms_eval.evaluator": {"simple_evaluate": fail},
        "lmms_eval.tasks": {"TaskManager": lambda **_: SimpleNamespace(all_tasks=["mmstar"])},
        "tenacity": {"RetryError": _RetryError},
        "prism_deco.integrations.lmms_eval": {"PrismDeco": lambda *_: None},
    }
    for name, content in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    is_bug = isinstance(cause, TypeError)
    with pytest.raises(_RetryError if is_bug else UsageError) as refusal:
        score_tasks(tmp_path, ["mmstar"], tmp_path, model_id="")
    assert is_bug or "cannot load the data of mmstar (no network)" in str(refusal.value)
