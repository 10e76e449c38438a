"""Differences between projectors, recomputed from the predictions files by plain loops."""

import csv
import json
import math
import shutil

import pytest

from prism_deco.report.assemble import write_report
from prism_deco.report.cells import seed_groups
from prism_deco.report.collect import collect
from prism_deco.report.paired_tests import paired_differences


def _scores(folder, benchmark):
    lines = (folder / "eval" / benchmark / "predictions.jsonl").read_text().splitlines()
    return {record["question_id"]: record for record in map(json.loads, lines)}


def _find(found, benchmark, first="avgpool", second="c_abstractor"):
    [one] = [d for d in found if (d.benchmark, d.first, d.second) == (benchmark, first, second)]
    return one


@pytest.fixture
def runs(make, tmp_path):
    for name, seed in (("avgpool", 7), ("avgpool", 8), ("c_abstractor", 7), ("c_abstractor", 8)):
        make.run(tmp_path / f"{name}-{seed}", f"projector={name}", f"seed={seed}", benchmarks=("pope", "gqa"), n=90)
    return tmp_path


def _by_loop(runs, benchmark, part=None):
    """Mean over both seeds of the score differences of each question."""
    sums = {}
    for seed in (7, 8):
        one, other = (_scores(runs / f"{name}-{seed}", benchmark) for name in ("avgpool", "c_abstractor"))
        for key, record in one.items():
            if part is None or record["target"]["subset"] == part:
                sums[key] = sums.get(key, 0) + (record["score"] - other[key]["score"]) / 2
    return list(sums.values())


def test_values_and_tests_follow_from_the_predictions(runs):
    found = paired_differences(seed_groups(collect([runs])), ["mini_pope", "mini_gqa"], "")
    gqa, values = _find(found, "mini_gqa"), _by_loop(runs, "mini_gqa")
    assert gqa.value == pytest.approx(100 * sum(values) / 90) and gqa.seeds == 2
    ahead, behind = sum(v > 0 for v in values), sum(v < 0 for v in values)
    assert ahead != behind
    tail = sum(math.comb(ahead + behind, k) for k in range(min(ahead, behind) + 1))
    assert gqa.p == pytest.approx(2 * tail / 2 ** (ahead + behind))
    pope = _find(found, "mini_pope")
    parts = [_by_loop(runs, "mini_pope", part) for part in ("random", "popular", "adversarial")]
    assert pope.value == pytest.approx(100 * sum(sum(part) / len(part) for part in parts) / 3)
    assert sorted([gqa.adjusted, pope.adjusted]) == sorted(
        [min(1, 2 * min(gqa.p, pope.p)), max(gqa.p, pope.p, min(1, 2 * min(gqa.p, pope.p)))]
    )
    assert gqa.interval[0] < gqa.value < gqa.interval[1]
    assert gqa.over_seeds[0] < gqa.value < gqa.over_seeds[1]


def test_tasks_of_lmms_eval_are_compared_by_the_scores_that_it_gave(runs, tmp_path, caplog):
    """Beside the report's own benchmarks; they have no chance level."""
    for folder in runs.glob("*-*/eval"):
        shutil.copytree(folder / "mini_gqa", folder / "ocrbench")
        path = folder / "ocrbench/metrics.json"
        harness = {"benchmark": "ocrbench", "decoding": {"harness": "lmms-eval 0.7.3"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | harness))
    found = paired_differences(seed_groups(collect([runs])), ["mini_gqa", "ocrbench"], "")
    ours, theirs = (_find(found, name) for name in ("mini_gqa", "ocrbench"))
    assert (theirs.value, theirs.interval, theirs.p) == (ours.value, ours.interval, ours.p)
    page, _ = write_report([runs], tmp_path / "report")
    assert "ocrbench" in page.read_text()
    records = list(csv.DictReader((tmp_path / "report/scores.csv").open()))
    [mine] = [r for r in records if r["benchmark"] == "mini_gqa" and r["projector"] == "avgpool"]
    [other] = [r for r in records if r["benchmark"] == "ocrbench" and r["projector"] == "avgpool"]
    assert (other["score"], other["chance"]) == (mine["score"], "") and mine["chance"]
    assert "ocrbench" not in caplog.text


def test_only_common_seeds_count_and_the_order_of_lines_does_not(runs, make):
    whole = _find(paired_differences(seed_groups(collect([runs])), ["mini_gqa"], ""), "mini_gqa")
    path = runs / "avgpool-7/eval/mini_gqa/predictions.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    assert _find(paired_differences(seed_groups(collect([runs])), ["mini_gqa"], ""), "mini_gqa") == whole
    (runs / "c_abstractor-8/eval/mini_gqa/metrics.json").unlink()
    one = _find(paired_differences(seed_groups(collect([runs])), ["mini_gqa"], ""), "mini_gqa")
    assert one.seeds == 1 and one.over_seeds is None and one.value != whole.value


def test_what_cannot_be_compared_says_why(runs):
    path = runs / "c_abstractor-7/eval/mini_gqa/metrics.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"data_hash": "other"}))
    groups = seed_groups(collect([runs]))
    assert _find(paired_differences(groups, ["mini_gqa"], ""), "mini_gqa").note == "the questions differ"
    content["metrics"]["accuracy"] += 1
    path.write_text(json.dumps(content))
    changed = _find(paired_differences(seed_groups(collect([runs])), ["mini_gqa"], ""), "mini_gqa")
    assert "do not give the score" in changed.note
    missing = _find(paired_differences(groups, ["mini_vqav2"], ""), "mini_vqav2")
    assert missing.value is None and missing.p is None and missing.note == "avgpool: not scored"


def test_sums_over_pairs_of_questions_are_compared_too(make, tmp_path):
    """MME: 100 for each task's accuracy, 100 for the images with both questions right."""
    right = {"avgpool": [(1, 1), (1, 0), (1, 1), (0, 0)], "c_abstractor": [(1, 0), (1, 0), (1, 1), (0, 1)]}
    for name, images in right.items():
        make.run(tmp_path / name, f"projector={name}", benchmarks=())
        folder = tmp_path / name / "eval/mme"
        folder.mkdir(parents=True)
        records = [
            {
                "question_id": f"{k}{q}",
                "image": f"{k}.png",
                "prompt": "?",
                "output": "Yes",
                "answer": "yes",
                "target": {"answer": "yes", "task": "count"},
                "score": float(score),
            }
            for k, pair in enumerate(images)
            for q, score in enumerate(pair)
        ]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        value = 100 * sum(map(sum, images)) / 8 + 100 * sum(all(pair) for pair in images) / 4
        content = {"benchmark": "mme", "metrics": {"score": value}, "primary": "score", "n": 8, "interval95": [0, 200]}
        content |= {"prompt_hash": "p", "data_hash": "d", "decoding": None}
        (folder / "metrics.json").write_text(json.dumps(content))
    mme = _find(paired_differences(seed_groups(collect([tmp_path])), ["mme"], ""), "mme")
    assert mme.value == pytest.approx((62.5 + 50) - (62.5 + 25))
    assert mme.p == 1  # of four images one is better, one is worse


def test_answers_are_compared_in_the_way_that_they_were_asked_first(make, tmp_path):
    """TextVQA's YAML asks with OCR tokens first; these runs were asked as the PRISM harness does, then without."""
    prism = ("recipe=prism", "backbone=clip_vit_l_336", "llm=phi2", "data=llava", "data.json=x.json")
    for name in ("avgpool", "c_abstractor"):
        make.run(tmp_path / name, *prism, f"projector={name}", "evaluate.benchmarks=table3", benchmarks=("textvqa",))
        folder = tmp_path / name / "eval/textvqa"
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        with (folder / "predictions.jsonl").open("w") as file:
            for variant in ("prism", "plain"):
                for line in lines:
                    score = line["score"] if variant == "prism" else 0.0
                    own = {"target": line["target"] | {"variant": variant}, "score": score}
                    own["question_id"] = f"{line['question_id']}/{variant}"
                    file.write(json.dumps(line | own) + "\n")
        content = json.loads((folder / "metrics.json").read_text()) | {"variants": ["prism", "plain"]}
        content["metrics"]["plain/accuracy"] = 0.0
        (folder / "metrics.json").write_text(json.dumps(content))
    [found] = [one for one in paired_differences(seed_groups(collect([tmp_path])), ["textvqa"], "")]
    scores = [_scores(tmp_path / name, "textvqa") for name in ("avgpool", "c_abstractor")]
    first, second = (sum(one["score"] for one in own.values()) / 60 * 100 for own in scores)
    assert (found.value, found.variant, found.note) == (pytest.approx(first - second), "prism", "")
    page, _ = write_report([tmp_path], tmp_path / "out")
    assert "Asked as: textvqa prism." in page.with_suffix(".md").read_text()
    for name in ("scores", "run_scores", "differences", "readings"):
        rows = list(csv.DictReader((tmp_path / f"out/{name}.csv").read_text().splitlines()))
        of_textvqa = [row for row in rows if "textvqa" in (row.get("benchmark"), row.get("measure"))]
        ways = [row["variant"] for row in of_textvqa if row.get("score") or row.get("value")]
        assert ways and set(ways) == {"plain" if name == "readings" else "prism"}, name
