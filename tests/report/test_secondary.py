"""Second numbers beside the primary metrics, and how cells depart from their recipe."""

import csv
import json
import statistics

import pytest
from omegaconf import OmegaConf

from prism_deco.config import choices, load_config
from prism_deco.evaluation import Prediction, build_benchmark, resolve
from prism_deco.report import readings
from prism_deco.report.assemble import write_report
from prism_deco.report.collect import collect
from prism_deco.report.grid import build_grids
from prism_deco.report.recipe_diff import departures, sentences
from prism_deco.report.tabular import MISSING, Field
from prism_deco.stages import final_config

TABLE_1 = ("backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "data=llava", "data.json=x.json")
FINETUNE = ("recipe=llava_v1_5_finetune", *TABLE_1, "recipe.start_from=runs/x-align")
PRISM = ("recipe=prism", "backbone=clip_vit_l_336", "llm=phi2", "data=llava", "data.json=x.json")
TOKENS = {"visual_in": 576, "visual_out": 144}


def _with(folder, benchmark, **metrics):
    path = folder / "eval" / benchmark / "metrics.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"metrics": content["metrics"] | metrics}))


def test_second_numbers_stand_beside_the_primary_and_the_papers(make, tmp_path):
    scores = make.run(tmp_path / "a", *PRISM, "evaluate.benchmarks=table3", tokens=TOKENS)
    make.run(tmp_path / "b", *PRISM, "projector=c_abstractor", state="failed")
    _with(tmp_path / "a", "textvqa", **{"plain/accuracy": 33.25, "prism/accuracy": 44.0, "plain/invalid_rate": 0.5})
    [grid] = build_grids(collect([tmp_path]), "")
    table = readings.table(grid)
    assert list(table.columns) == [
        "row",
        "projector",
        "pope: f1",
        "pope: generate/accuracy",
        "refcoco: accuracy pad corrected",
        "textvqa: plain/accuracy",
        "textvqa: prism/accuracy",
    ]
    [row] = table.rows  # lines without scores have no second numbers either
    assert [field.text for field in row] == [
        "B2",
        "avgpool",
        f"{scores['pope'] + 2:.1f}",
        f"{scores['pope'] - 3:.1f}",
        f"{scores['refcoco'] / 2:.1f}",
        "33.2",
        "44.0",
    ]
    assert row[2].lines == (f"accuracy {scores['pope']:.1f}", "paper 84.5")
    assert row[4].lines == (f"accuracy {scores['refcoco']:.1f}", "paper 15.0")
    assert "f1: mean over" in table.caption and "The paper does not say" in table.caption


def test_second_numbers_of_the_miniature_are_means_over_seeds(mini_sweep):
    [grid] = build_grids(collect([mini_sweep]), "")
    table = readings.table(grid)
    values = [
        json.loads((mini_sweep / f"M1-avgpool-{seed}/eval/mini_pope/metrics.json").read_text())["metrics"]["f1"]
        for seed in (7, 8, 9)
    ]
    column = list(table.columns).index("mini_pope: f1")
    first = table.rows[0]
    assert first[column].text == f"{statistics.mean(values):.1f} ±{statistics.stdev(values):.1f}"
    assert first[column].lines == (f"accuracy {statistics.mean(values) - 2:.1f}",)
    assert [(row[0].text, row[1].text) for row in table.rows] == [
        ("M1", "avgpool"),
        ("", "c_abstractor"),
        ("M2", "avgpool"),
        ("", "c_abstractor"),
    ]
    assert table.rows[1][column].lines[-1] == "2 of 3 seeds" and "±" not in table.rows[3][column].text
    assert table.starts == {0, 2} and "The paper" not in table.caption


def test_what_is_missing_is_said(make, tmp_path):
    make.run(tmp_path / "a", benchmarks=("pope", "refcoco"))
    make.run(tmp_path / "b", "projector=maxpool", benchmarks=("pope",))
    path = tmp_path / "b/eval/mini_pope/metrics.json"
    content = json.loads(path.read_text())
    del content["metrics"]["f1"]
    path.write_text(json.dumps(content))
    [grid] = build_grids(collect([tmp_path]), "")
    _, row = readings.table(grid).rows
    assert row[2] == Field(MISSING, muted=True)  # asked, but without this metric
    assert row[4] == Field("not scored", muted=True)


def test_no_table_without_second_numbers(make, tmp_path):
    make.run(tmp_path / "a", benchmarks=("gqa", "vqav2"))
    [grid] = build_grids(collect([tmp_path]), "")
    assert readings.table(grid) is None and readings.records(grid) == []
    write_report([tmp_path / "a"], tmp_path / "out")
    assert (
        not (tmp_path / "out/readings.csv").exists()
        and "Other readings" not in (tmp_path / "out/report.md").read_text()
    )


def test_the_report_has_the_table_and_its_csv(make, tmp_path):
    scores = make.run(tmp_path / "a", *PRISM, "recipe.lr=1e-5", tokens=TOKENS)
    page, _ = write_report([tmp_path / "a"], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/readings.csv").open()))
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
    markdown = (tmp_path / "out/report.md").read_text()
    assert markdown.index("Table 3 of the paper") < markdown.index("### Other readings") < markdown.index("### Wins")
    said = "a: differs from recipe=prism: recipe.lr=1e-5 (default 2e-5)."
    assert f"**Other settings:** {said}" in markdown and f"<li>{said}</li>" in page.read_text()


@pytest.mark.parametrize("kind", [kind for kind in resolve("table1,mini") if "refcoco" in kind or "pope" in kind])
def test_the_metrics_are_those_of_the_benchmarks(kind):
    """Their names are written by the benchmarks and read here."""
    benchmark = build_benchmark(kind)
    target = {"box": [0.0, 0.0, 1.0, 1.0], "width": 2, "height": 1, "answer": "yes", "subset": "random"}
    prediction = Prediction("1", "x.png", "?", "No", None, target, 0.0)
    assert set(benchmark.metrics([prediction])) & set(readings.SECOND)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (FINETUNE, ""),
        ((*FINETUNE, "recipe.micro_batch_size=4", "recipe.packing=true", "recipe.num_tokens=64"), ""),
        (
            (*FINETUNE, "recipe.lr=2e-5"),
            "differs from recipe=llava_v1_5_finetune: recipe.lr=2e-5 (default 2e-4)",
        ),
        (
            (*FINETUNE, "recipe.lm=full", "recipe.projector_lr=null", "recipe.weight_decay=0.1"),
            "differs from recipe=llava_v1_5_finetune: recipe.lm=full (default lora); "
            "recipe.projector_lr=null (default 2e-5); recipe.weight_decay=0.1 (default 0.0)",
        ),
        ((*FINETUNE, "recipe.start_from=null"), "no align stage (recipe.start_from)"),
        (
            (*FINETUNE, "recipe.start_from=null", "recipe.lr=2e-5"),
            "differs from recipe=llava_v1_5_finetune: recipe.lr=2e-5 (default 2e-4); "
            "no align stage (recipe.start_from)",
        ),
        (PRISM, ""),
        (
            (*PRISM, "recipe.start_from=/elsewhere/runs/x", "recipe.betas=[0.9,0.98]", "recipe.max_steps=10"),
            "differs from recipe=prism: recipe.max_steps=10 (default null); "
            "recipe.betas=[0.9, 0.98] (default [0.9, 0.999]); recipe.start_from=x (default null)",
        ),
        ((*PRISM, "projector=qformer"), "Q-Former from random weights (the paper's starts from BLIP-2)"),
        ((*PRISM, "projector=qformer", "projector.weights=blip2.pth"), ""),
    ],
)
def test_departures_from_a_recipe(overrides, expected, tmp_path):
    config = load_config(overrides)
    assert departures(config) == expected
    # The same from a run's file, which is read without the schema.
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    assert departures(OmegaConf.load(tmp_path / "config.yaml")) == expected


@pytest.mark.parametrize("recipe", [name for name in choices("recipe") if "two_stage" in name or name == "llava_v1_5"])
def test_a_recipe_of_stages_departs_from_nothing(recipe):
    assert departures(final_config([f"recipe={recipe}"])) == ""


def test_keys_that_an_earlier_version_lacked_are_no_difference():
    config = load_config(FINETUNE)
    content = OmegaConf.to_container(config, resolve=True)
    for key in ("start_from", "tokenize", "lora_r"):
        del content["recipe"][key]
    content["recipe"]["removed_since"] = 1
    assert departures(OmegaConf.create(content)) == "no align stage (recipe.start_from)"


def test_cells_with_the_same_departure_share_a_sentence(make, tmp_path):
    for name, *more in (("a",), ("b", "seed=8"), ("c", "recipe.lr=2e-4"), ("d", "projector=qformer")):
        make.run(tmp_path / name, *PRISM, *more, benchmarks=("gqa",))
    make.run(tmp_path / "e", *PRISM, "recipe.lr=2e-4", "seed=8", benchmarks=("gqa",))
    assert sentences(collect([tmp_path])) == [
        "c, e: differs from recipe=prism: recipe.lr=2e-4 (default 2e-5).",
        "d: Q-Former from random weights (the paper's starts from BLIP-2).",
    ]


def test_cells_say_what_was_learned_how_fast(make, tmp_path):
    make.run(tmp_path / "a", *FINETUNE, "recipe.start_from=/elsewhere/runs/x-align", benchmarks=("gqa",))
    make.run(tmp_path / "b", *PRISM, benchmarks=("gqa",))
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out", mixed=True)
    rows = list(csv.DictReader((tmp_path / "out/cells.csv").open()))
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
    assert recipe.start_from.endswith("q-align") and departures(cell.config) == ""
    [grid] = build_grids([cell], "")
    assert grid.table == 1 and [line.missing for line in grid.lines if line.entry] == ["planned"]
