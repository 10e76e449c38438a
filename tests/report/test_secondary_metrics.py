"""Second numbers beside the primary metrics, and what cells were trained with."""

import csv
import json
import statistics

import pytest

from prism_deco.evaluation import Prediction, build_benchmark, resolve
from prism_deco.report import paper
from prism_deco.report.assemble import write_report
from prism_deco.report.collect import collect
from prism_deco.report.grid import SECONDARY, score_tables, secondary_records
from prism_deco.report.recipe_diff import departures
from prism_deco.report.tables import scores_table

TABLE_1 = ("backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "data=llava", "data.json=x.json")
FINETUNE = ("recipe=llava_v1_5_finetune", *TABLE_1, "recipe.start_from=runs/x-align")
PRISM = ("recipe=prism", "backbone=clip_vit_l_336", "llm=phi2", "data=llava", "data.json=x.json")
TOKENS = {"visual_in": 576, "visual_out": 144}


def _with(folder, benchmark, **metrics):
    path = folder / "eval" / benchmark / "metrics.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"metrics": content["metrics"] | metrics}))


def _lines(table, row, projector, benchmark):
    """The small print of a field of a table of scores."""
    heading = ""
    for fields in table.rows:
        if len(fields) == 1:
            heading = fields[0].text
        elif (heading, fields[0].text) == (row, projector):
            return fields[list(table.columns).index(benchmark)].lines
    raise AssertionError((row, projector))


def test_secondary_metrics_stand_below_the_primary_and_the_papers(make, tmp_path):
    scores = make.run(tmp_path / "a", *PRISM, "evaluate.benchmarks=table3", tokens=TOKENS)
    make.run(tmp_path / "b", *PRISM, "projector=c_abstractor", state="failed")
    _with(tmp_path / "a", "textvqa", **{"plain/accuracy": 33.25, "prism/accuracy": 44.0, "plain/invalid_rate": 0.5})
    [found] = score_tables(collect([tmp_path]), "")
    table = scores_table(found)
    pope = _lines(table, "B2", "avgpool", "pope")
    assert pope[1] == "paper 84.5"
    assert pope[3:] == (f"f1 {scores['pope'] + 2:.1f}", f"generate/accuracy {scores['pope'] - 3:.1f}")
    assert _lines(table, "B2", "avgpool", "refcoco")[3:] == (f"accuracy pad corrected {scores['refcoco'] / 2:.1f}",)
    assert _lines(table, "B2", "avgpool", "textvqa")[3:] == ("plain/accuracy 33.2", "prism/accuracy 44.0")
    assert _lines(table, "B2", "avgpool", "gqa")[3:] == ()
    assert _lines(table, "B2", "c_abstractor", "pope") == (f"paper {paper.scores(3)['B2', 'c_abstractor']['pope']}",)
    assert "f1: mean over" in table.caption and "does not say which" in table.caption
    assert "another variant" in table.caption


def test_secondary_metrics_of_the_miniature_are_means_over_seeds(mini_sweep):
    [found] = score_tables(collect([mini_sweep]), "")
    values = [
        json.loads((mini_sweep / f"M1-avgpool-{seed}/eval/mini_pope/metrics.json").read_text())["metrics"]["f1"]
        for seed in (7, 8, 9)
    ]
    table = scores_table(found)
    assert f"f1 {statistics.mean(values):.1f}" in _lines(table, "M1", "avgpool", "mini_pope")
    assert "The paper" not in table.caption
    [record] = [
        record
        for record in secondary_records(found)
        if (record["row"], record["projector"], record["metric"]) == ("M1", "avgpool", "f1")
    ]
    assert record["score"] == pytest.approx(statistics.mean(values))
    assert record["deviation"] == pytest.approx(statistics.stdev(values)) and record["seeds"] == 3
    assert (record["primary_metric"], record["primary"]) == ("accuracy", pytest.approx(statistics.mean(values) - 2))


def test_a_metric_that_some_seeds_do_not_have_is_a_mean_over_the_others(make, tmp_path):
    for seed in (1, 2):
        make.run(tmp_path / str(seed), f"seed={seed}", benchmarks=("pope",))
    path = tmp_path / "2/eval/mini_pope/metrics.json"
    content = json.loads(path.read_text())
    del content["metrics"]["f1"]
    path.write_text(json.dumps(content))
    first = json.loads((tmp_path / "1/eval/mini_pope/metrics.json").read_text())["metrics"]["f1"]
    [found] = score_tables(collect([tmp_path]), "")
    [record] = [record for record in secondary_records(found) if record["metric"] == "f1"]
    assert (record["score"], record["seeds"], record["planned_seeds"], record["deviation"]) == (first, 1, 2, None)


def test_no_file_without_secondary_metrics(make, tmp_path):
    make.run(tmp_path / "a", benchmarks=("gqa", "vqav2"))
    write_report([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out/readings.csv").exists()


def test_the_report_has_their_csv(make, tmp_path):
    scores = make.run(tmp_path / "a", *PRISM, "recipe.lr=1e-5", tokens=TOKENS)
    write_report([tmp_path / "a"], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/readings.csv").read_text().splitlines()))
    assert {(row["benchmark"], row["metric"]) for row in rows} == {
        ("pope", "f1"),
        ("pope", "generate/accuracy"),
        ("refcoco", "accuracy_pad_corrected"),
    }
    [row] = [row for row in rows if row["metric"] == "f1"]
    assert (row["table"], row["row"], row["projector"], row["seeds"], row["paper"]) == (
        "3",
        "B2",
        "avgpool",
        "1",
        "84.5",
    )
    assert float(row["score"]) == pytest.approx(scores["pope"] + 2, rel=1e-5)
    assert float(row["primary"]) == pytest.approx(scores["pope"], rel=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in resolve("table1,mini") if "refcoco" in kind or "pope" in kind])
def test_the_metrics_are_those_of_the_benchmarks(kind):
    """Their names are written by the benchmarks and read here."""
    benchmark = build_benchmark(kind)
    target = {"box": [0.0, 0.0, 1.0, 1.0], "width": 2, "height": 1, "answer": "yes", "subset": "random"}
    prediction = Prediction("1", "x.png", "?", "No", None, target, 0.0)
    assert set(benchmark.metrics([prediction])) & set(SECONDARY)


def test_cells_say_what_was_learned_how_fast(make, tmp_path):
    make.run(tmp_path / "a", *FINETUNE, "recipe.start_from=/elsewhere/runs/x-align", benchmarks=("gqa",))
    make.run(tmp_path / "b", *PRISM, benchmarks=("gqa",))
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out", mixed=True)
    rows = list(csv.DictReader((tmp_path / "out/cells.csv").read_text().splitlines()))
    names = ("cell", "recipe", "lm", "start_from", "lr", "projector_lr")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("a", "llava_v1_5_finetune", "lora", "x-align", "0.0002", "2e-05"),
        ("b", "prism", "full", "", "2e-05", "2e-05"),
    ]
    assert "elsewhere" not in "".join((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))


def test_a_planned_cell_of_a_recipe_of_stages_is_known_by_its_last(make, tmp_path):
    """Its row says what will be learned, not what the schema has where a recipe has stages."""
    overrides = ["recipe=llava_v1_5", "backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "align.recipe.lr=5e-4"]
    make.ledger(
        tmp_path / "s", [{"id": "q", "labels": {"projector": "avgpool"}, "overrides": overrides, "state": "planned"}]
    )
    [cell] = collect([tmp_path / "s"])
    assert cell.config is not None
    assert (cell.state, cell.reason) == ("planned", "")
    recipe = cell.config.recipe
    assert (recipe.name, recipe.lm, recipe.lr) == ("llava_v1_5_finetune", "lora", 2e-4)
    assert recipe.start_from.endswith("q-align")
    assert "recipe.start_from" not in [departure.setting for departure in departures(cell, 1)]
    [grid] = score_tables([cell], "")
    assert grid.table == 1 and [group.missing for group in grid.groups] == ["planned"]
