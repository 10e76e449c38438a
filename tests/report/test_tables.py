"""What the tables say: scores beside the paper's, missing cells, floors, wins, budgets."""

import csv
import importlib
import json
import statistics
import sys
from dataclasses import replace

import pytest

from prism_deco.cli import main
from prism_deco.config import CONF_DIR
from prism_deco.errors import UsageError
from prism_deco.evaluation import BENCHMARKS
from prism_deco.report import baselines, paper, tables
from prism_deco.report.assemble import write_report
from prism_deco.report.baselines import chance
from prism_deco.report.cells import SeedGroup, Summary
from prism_deco.report.collect import collect
from prism_deco.report.figures import Point, budget_table, pareto_front, points
from prism_deco.report.grid import _paper_rows, score_records, score_tables
from prism_deco.report.paired_tests import paired_differences
from prism_deco.report.tabular import Field, Table, comma_separated, markdown

PRISM = ("recipe=prism", "data=llava", "data.json=x.json", "evaluate.benchmarks=table3")


def _cell(table, row, projector, column):
    """The field of a table, below the heading of its row."""
    heading = ""
    for line in table.rows:
        if len(line) == 1:
            heading = line[0].text
        elif (heading, line[0].text) == (row, projector):
            return line[list(table.columns).index(column)]
    raise AssertionError((row, projector))


def _table_1_run(make, folder, projector, scores, tasks):
    table_1 = ("recipe=llava_v1_5_finetune", "backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5")
    overrides = (*PRISM, *table_1, f"projector={projector}")
    tokens = {"visual_in": 576, "visual_out": 576 if projector == "linear" else 144}
    make.run(folder, *overrides, benchmarks=(*scores, "mmbench"), tokens=tokens)
    for name, value in scores.items():
        path = folder / "eval" / name / "metrics.json"
        content = json.loads(path.read_text())
        primary = "score" if name == "mme" else "accuracy"
        content |= {"metrics": {primary: value, **tasks.get(name, {})}, "primary": primary}
        path.write_text(json.dumps(content))
    path = folder / "eval/mmbench/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"accuracy": 50.0, **tasks["mmbench"]}}))


@pytest.fixture(scope="module")
def grid(mini_sweep):
    [grid] = score_tables(collect([mini_sweep]), "")
    return grid


def test_means_and_spreads_are_over_seeds(grid, mini_sweep):
    values = [
        json.loads((mini_sweep / f"M1-avgpool-{seed}/eval/mini_gqa/metrics.json").read_text())["metrics"]["accuracy"]
        for seed in (7, 8, 9)
    ]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    field = _cell(tables.scores_table(grid), "M1", "avgpool", "mini_gqa")
    half = 4.3027 * deviation / 3**0.5
    assert field.text == f"{mean:.1f} ±{deviation:.1f}"
    assert field.lines == (f"{mean - half:.1f} to {mean + half:.1f}",)


def test_seeds_that_are_missing_are_counted(grid, mini_sweep):
    shown = tables.scores_table(grid)
    assert _cell(shown, "M1", "c_abstractor", "mini_gqa").lines[-1] == "2 of 3 seeds"
    one = _cell(shown, "M2", "c_abstractor", "mini_gqa")
    content = json.loads((mini_sweep / "M2-c_abstractor-7/eval/mini_gqa/metrics.json").read_text())
    low, high = content["interval95"]
    assert one.text == f"{content['metrics']['accuracy']:.1f}"
    assert one.lines == (f"{low:.1f} to {high:.1f}", "1 of 3 seeds") and not one.best


def test_chance_and_blindness_stand_below(grid):
    shown = tables.scores_table(grid)
    assert [row[0].text for row in shown.rows].count("chance") == 2  # one per row of the study
    assert _cell(shown, "M1", "chance", "mini_pope").text == "50.0"  # as many yes as no
    known = baselines.blind_scores(grid.groups[0].cells[0].config, None)
    assert _cell(shown, "M1", "blind", "mini_gqa").text == f"{known['mini_gqa']:.1f}"


def test_a_blind_run_of_the_study_is_the_baseline_and_not_a_line_of_its_own(make, tmp_path):
    make.run(tmp_path / "a")
    scores = make.run(tmp_path / "b", "recipe.blind=true", skill=0.2)
    [grid] = score_tables(collect([tmp_path]), "")
    assert [row.variant for row in grid.rows] == ["avgpool"]
    assert grid.blind["mini_siglip + mini_qwen2"] == pytest.approx(scores)


def test_wins_of_ours_are_counted_by_row_and_benchmark(grid):
    table = tables.wins_table(grid)
    [row] = table.rows
    assert [field.text for field in row] == ["avgpool over c_abstractor", "16", "0", "0", "0"]


def test_table_3_prints_all_of_the_papers_numbers_beside_ours(make, tmp_path):
    overrides = ("backbone=clip_vit_l_336", "llm=phi2", *PRISM)
    tokens = {"visual_in": 576, "visual_out": 144}
    scores = make.run(tmp_path / "a", *overrides, tokens=tokens)
    make.run(tmp_path / "b", *overrides, "projector=maxpool", tokens=tokens)
    make.run(tmp_path / "c", *overrides, "projector=c_abstractor", state="failed")
    [grid] = score_tables(collect([tmp_path]), "")
    shown = tables.scores_table(grid)
    for line in paper.rows(3):
        for name, value in line.scores.items():
            field = _cell(shown, line.setting, line.projector, name)
            assert f"paper {value:.1f}" in field.lines
            ran = (line.setting, line.projector) == ("B2", "avgpool")
            waiting = "failed" if line.setting == "B2" else "not run"
            assert field.text == (f"{scores[name]:.1f}" if ran else waiting)
            assert (f"Δ {scores[name] - value:+.1f}" in field.lines) == ran
    assert _cell(shown, "B2", "maxpool", "gqa").lines[-1].count("to") == 1  # no number of the paper
    mean = _cell(shown, "B2", "avgpool", "mean")
    assert mean.text == f"{statistics.mean(scores.values()):.1f}" and "paper 37.5" in mean.lines
    [pair, _] = tables.wins_table(grid).rows
    assert [f.text for f in pair] == [
        "avgpool over c_abstractor",
        "0",
        "0",
        "0",
        "48",
        "45 of 48 ahead, 2 behind, 1 tied",
    ]
    assert len(score_records(grid)) == 13 * 8
    [record] = [
        r for r in score_records(grid) if (r["row"], r["projector"], r["benchmark"]) == ("B2", "avgpool", "pope")
    ]
    assert record["paper"] == 84.5 and record["difference"] == pytest.approx(scores["pope"] - 84.5)


def test_tables_1_and_2_stand_beside_the_papers(make, tmp_path):
    columns = paper.COLUMNS[1]
    ours = {"avgpool": dict(paper.scores(1)["T1", "avgpool"]), "c_abstractor": dict.fromkeys(columns, 50.0)}
    ours["avgpool"]["gqa"] += 1.5
    tasks = {
        "mme": {"score/position": 130.0},
        "mmbench": {
            "accuracy/object_localization": 40.0,
            "accuracy/physical_relation": 30.0,
            "accuracy/spatial_relationship": 20.0,
        },
        "seed": {"accuracy/Spatial Relation": 50.0, "accuracy/Instance Location": 61.0},
    }
    for name, scores in ours.items():
        _table_1_run(make, tmp_path / name, name, scores, tasks)
    [grid] = score_tables(collect([tmp_path]), "")
    shown = tables.scores_table(grid)
    assert "mean" not in shown.columns  # MME is no percentage
    assert [line[0].text for line in shown.rows if len(line) > 1 and line[0].text != "chance"] == [
        "linear (LLaVA-1.5)",
        "linear",
        "avgpool",
        "qformer",
        "c_abstractor",
        "d_abstractor",
    ]
    assert _cell(shown, "T1", "avgpool", "gqa").lines[-2:] == ("paper 54.1", "Δ +1.5")
    assert _cell(shown, "T1", "avgpool", "mme").text == "1373.4"
    assert _cell(shown, "T1", "qformer", "mme") == Field("not run", ("paper 1312.7",))
    gains = {row[0].text: [field.text for field in row[1:]] for row in tables.gains_table(grid).rows}
    assert gains["visual localization"] == [f"{100 * ((43.4 + 38.5 + 39.3) / 3 - 50) / 50:+.1f}", "+7.16"]
    spatial = tables.spatial_table(grid)
    by_name = {row[0].text: row for row in spatial.rows}
    average = (65 + 40 + 30 + 20 + 50 + 61) / 6
    assert by_name["avgpool"][1] == Field("65.0")
    assert by_name["avgpool"][-1] == Field(f"{average:.1f}", ("paper 56.0", f"Δ {average - 56:+.1f}"))
    assert by_name["linear"][-1] == Field("not run", ("paper 56.4",))
    assert by_name["d_abstractor"][-1].lines == ()


def test_budgets_pick_what_nothing_cheaper_beats(make, tmp_path):
    for k, skill in ((4, 0.5), (16, 0.4), (64, 0.7)):
        make.run(tmp_path / f"k{k}", f"recipe.num_tokens={k}", skill=skill)
    [grid] = score_tables(collect([tmp_path]), "")
    assert [point.cost for point in points(grid)] == [4, 16, 64]
    assert [point.cost for point in pareto_front(points(grid))] == [4, 64]
    rows = budget_table(grid).rows
    assert [row[0].text for row in rows] == ["at most 4 visual tokens", "at most 64 visual tokens"]
    assert rows[1][4].text.endswith("num_tokens=4: avgpool") and not any(field.best for row in rows for field in row)


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(4, 50.0), (4, 50.0), (4, 49.0)], [0, 1]),  # as good for as little
        ([(4, 50.0), (16, 50.0), (64, 50.5)], [0, 2]),  # as good for more is worse
        ([(4, 50.0), (16, 51.0), (16, 51.0), (16, 50.5), (64, 51.0)], [0, 1, 2]),
        ([(4, 50.0), (16, 49.0), (64, 48.0)], [0]),
    ],
)
def test_ties_on_the_front(found, best):
    """By trying all pairs: a point is on the front unless another is no worse in both and better in one."""
    groups = [SeedGroup("row", str(k), ()) for k in range(len(found))]
    made = [
        Point(group, cost, Summary(score, None, (score, score), 1))
        for group, (cost, score) in zip(groups, found, strict=True)
    ]
    beaten = {
        k
        for k, (cost, score) in enumerate(found)
        for other, its in found
        if other <= cost and its >= score and (other < cost or its > score)
    }
    assert [k for k in range(len(found)) if k not in beaten] == best
    assert [int(point.group.variant) for point in pareto_front(made)] == best


def test_a_budget_names_all_that_tie(make, tmp_path):
    """Both projectors answer alike."""
    grid = _scored(make, tmp_path, avgpool=(50,), maxpool=(50,), qformer=(40,))
    [row] = budget_table(replace(grid, benchmarks=["mini_gqa"])).rows
    row_name = "mini_siglip + mini_qwen2"
    assert row[1].text == f"{row_name}: avgpool; {row_name}: maxpool" and row[4].text == f"{row_name}: qformer"


def test_chance_needs_only_the_predictions(make, tmp_path):
    make.run(tmp_path / "a", n=60)
    [cell] = collect([tmp_path / "a"])
    lines = (tmp_path / "a/eval/mini_gqa/predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line)["target"]["answer"] for line in lines]
    assert chance(cell.scores[""]["mini_gqa"]) == pytest.approx(100 * max(map(answers.count, answers)) / 60)


def test_markdown_and_csv_escape_what_they_are_given():
    table = Table("t <b>", ["a|b", "c"], [[Field("<script>|*x*", ("line\nbreak",)), Field("1", best=True)]])
    text = markdown(table)
    assert "| &lt;script&gt;\\|\\*x\\* *line break* | **1** |" in text and "a\\|b" in text
    made = comma_separated([{"name": "=1+1", "value": -1.5, "text": 'a,"b"', "none": None}])
    assert made == 'name,value,text,none\n\'=1+1,-1.5,"a,""b""",\n'
    assert comma_separated([]) == "\n"


@pytest.fixture
def own_benchmark(make, tmp_path):
    """Two projectors, two seeds, asked `mini_gqa` and copies of MME and RefCOCO in YAMLs of one's own; the folder."""
    (tmp_path / "own").mkdir()
    names = {"my_mme": ("mme", "mme"), "my_boxes": ("mini_refcoco", "refcoco"), "mini_gqa": ("mini_gqa", "gqa")}
    paths = []
    for name, (shipped, _) in names.items():
        path = tmp_path / "own" / f"{name}.yaml"
        path.write_text((CONF_DIR / "benchmark" / f"{shipped}.yaml").read_text())
        paths.append(str(path) if name.startswith("my") else name)
    for projector in ("avgpool", "maxpool"):
        for seed in (7, 8):
            folder = tmp_path / "runs" / f"{projector}-{seed}"
            overrides = (f"projector={projector}", f"seed={seed}", f"evaluate.benchmarks='{','.join(paths)}'")
            make.run(folder, *overrides, benchmarks=())
            skill = make.skill[projector]
            for name in ("my_boxes", "mini_gqa"):
                make.scores(folder / "eval" / name, name, skill, seed, kind=names[name][1])
            make.scores(folder / "eval/my_mme", "my_mme", skill, seed, kind="mme")
            path = folder / "eval/my_mme/metrics.json"
            content = json.loads(path.read_text())
            content |= {"primary": "score", "metrics": {"score": 1000.0 + seed}, "interval95": [900.0, 1100.0]}
            path.write_text(json.dumps(content))
    return tmp_path / "runs"


def test_a_benchmark_of_ones_own_is_the_one_that_its_yaml_names(own_benchmark):
    cells = collect([own_benchmark])
    [grid] = score_tables(cells, "")
    assert grid.benchmarks == ["mini_gqa", "my_boxes", "my_mme"] and not grid.has_mean
    shown = tables.scores_table(grid)
    assert "not scored" not in [field.text for row in shown.rows for field in row]
    # Scored, graded and compared as its family does, whatever its name.
    assert cells[0].scores[""]["my_mme"].percent == pytest.approx(100 * 1007 / 2000)
    assert grid.chance["my_boxes"] > 0 and grid.chance["mini_gqa"] > 0
    found = {pair.benchmark: pair for pair in paired_differences(grid.groups, grid.benchmarks, "")}
    assert found["my_boxes"].value is not None and found["my_boxes"].seeds == 2


def test_a_benchmark_whose_yaml_is_gone_keeps_its_name(own_benchmark):
    for path in (own_benchmark.parent / "own").iterdir():
        path.unlink()
    [grid] = score_tables(collect([own_benchmark]), "")
    assert grid.benchmarks == ["mini_gqa", "my_boxes", "my_mme"]
    found = {pair.benchmark: pair for pair in paired_differences(grid.groups, grid.benchmarks, "")}
    assert found["mini_gqa"].value is not None and "my_boxes.yaml: there is no such file" in found["my_boxes"].note


PLUGIN = """
from prism_deco.evaluation import BENCHMARKS
from prism_deco.evaluation.gqa import GQA

@BENCHMARKS.register("{family}")
class Own(GQA):
    def strata(self, predictions):
        {body}
"""


@pytest.mark.parametrize("works", [True, False])
def test_a_plug_in_benchmark_is_compared_and_its_bugs_are_not_hidden(make, tmp_path, monkeypatch, caplog, works):
    """A report reads its predictions by the plug-in's own code, which a run names in its configuration."""
    name = f"plugged_{works}"
    body = "return super().strata(predictions)" if works else "first, second = [1]"
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(family=name, body=body))
    shipped = (CONF_DIR / "benchmark/mini_gqa.yaml").read_text()
    (tmp_path / f"{name}.yaml").write_text(shipped.replace("family: gqa", f"family: {name}"))
    monkeypatch.syspath_prepend(tmp_path)
    BENCHMARKS.names()  # what is imported while the copy stands would be lost with it
    monkeypatch.setattr(BENCHMARKS, "_entries", dict(BENCHMARKS._entries))
    for projector in ("avgpool", "maxpool"):
        options = (f"evaluate.benchmarks={tmp_path}/{name}.yaml", f"plugins=[{name}]", f"projector={projector}")
        make.run(tmp_path / "runs" / projector, *options, benchmarks=())
        make.scores(tmp_path / "runs" / projector / "eval" / name, name, make.skill[projector], 7, kind="gqa")
    # Opening a folder does not run the code that it names.
    write_report([tmp_path / "runs"], tmp_path / "out")
    [row] = csv.DictReader((tmp_path / "out/differences.csv").read_text().splitlines())
    assert "Unknown benchmark family" in row["note"] and name not in sys.modules
    assert f"plugins=[{name}] on the command line" in caplog.text
    if not works:
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
        with pytest.raises(ValueError, match="not enough values to unpack") as raised:
            write_report([tmp_path / "runs"], tmp_path / "out")
        assert not isinstance(raised.value, UsageError) and raised.traceback[-1].path.name == f"{name}.py"
        return
    assert main(["report", str(tmp_path / "runs"), f"plugins=[{name}]", "--out", str(tmp_path / "out")]) == 0
    [row] = csv.DictReader((tmp_path / "out/differences.csv").read_text().splitlines())
    assert (row["benchmark"], row["note"]) == (name, "") and float(row["value"]) > 0
    [row, _] = csv.DictReader((tmp_path / "out/scores.csv").read_text().splitlines())
    assert float(row["chance"]) > 0


def _set_score(folder, benchmark, value):
    """Answers of which the first `value` per cent are right, and their score."""
    path = folder / "eval" / benchmark
    lines = (path / "predictions.jsonl").read_text().splitlines()
    graded = [json.loads(line) | {"score": float(100 * k < value * len(lines))} for k, line in enumerate(lines)]
    (path / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in graded))
    content = json.loads((path / "metrics.json").read_text())
    content |= {"metrics": {"accuracy": 100 * statistics.mean(record["score"] for record in graded)}}
    (path / "metrics.json").write_text(json.dumps(content | {"interval95": [value - 2, value + 2]}))


def _scored(make, folder, **scores):
    """A grid of one row: projector -> scores of `mini_gqa` by seed."""
    for projector, values in scores.items():
        for seed, value in enumerate(values, start=1):
            run = folder / f"{projector}-{seed}"
            make.run(run, f"projector={projector}", f"seed={seed}", benchmarks=("gqa",), n=100)
            _set_score(run, "mini_gqa", value)
    [grid] = score_tables(collect([folder]), "")
    return grid


def test_intervals_stay_within_what_a_score_can_be(make, tmp_path):
    """Student's t over seeds knows of no ends."""
    grid = _scored(make, tmp_path, avgpool=(0, 4, 17), linear=(99, 100, 94), maxpool=(40, 50, 60))
    shown = tables.scores_table(grid)
    assert statistics.mean((0, 4, 17)) - 4.3027 * statistics.stdev((0, 4, 17)) / 3**0.5 < 0
    assert _cell(shown, "mini_siglip + mini_qwen2", "avgpool", "mini_gqa").lines[0].startswith("0.0 to 29.")
    assert _cell(shown, "mini_siglip + mini_qwen2", "linear", "mini_gqa").lines[0].endswith(" to 100.0")
    assert _cell(shown, "mini_siglip + mini_qwen2", "maxpool", "mini_gqa").lines[0] == "25.2 to 74.8"
    found = [record for record in score_records(grid) if record["benchmark"] == "mini_gqa"]
    by_projector = {record["projector"]: record for record in found}
    assert (by_projector["avgpool"]["low95"], by_projector["linear"]["high95"]) == (0, 100)
    overall = {group.variant: group.overall(["mini_gqa"], "").interval for group in grid.groups}
    assert overall["avgpool"][0] == 0 and overall["linear"][1] == 100


def test_the_mean_of_one_seed_stays_within_what_it_can_be(make, tmp_path):
    grid = _scored(make, tmp_path, avgpool=(1,), linear=(99,))
    low, high = (group.overall(["mini_gqa"], "").interval for group in sorted(grid.groups, key=lambda g: g.variant))
    assert low == (0, 3) and high == (97, 100)


def _bold(grid, column):
    """The projectors that are bold in a column."""
    shown = tables.scores_table(grid, paired_differences(grid.groups, grid.benchmarks, grid.split, grid.has_mean))
    column = list(shown.columns).index(column)
    return [row[0].text for row in shown.rows if len(row) > 1 and row[column].best]


@pytest.mark.parametrize(
    ("scores", "bold"),
    [
        ({"avgpool": (50, 52, 51), "linear": (40, 41, 42)}, ["avgpool"]),
        ({"avgpool": (50, 52, 51), "linear": (49, 53, 50)}, []),  # over seeds the difference includes zero
        ({"avgpool": (50, 52, 51), "linear": (40, 41, 42), "maxpool": (49, 53, 50)}, []),
        ({"avgpool": (0, 0), "linear": (0, 0)}, []),
        ({"avgpool": (51,), "linear": (50,)}, []),  # over questions it does
        ({"avgpool": (60,), "linear": (50,)}, ["avgpool"]),
        ({"avgpool": (60, 61)}, []),
    ],
)
def test_only_a_clear_lead_is_bold(make, tmp_path, scores, bold):
    grid = _scored(make, tmp_path, **scores)
    assert _bold(grid, "mini_gqa") == bold


@pytest.mark.parametrize(
    ("gqa", "vqav2", "bold"),
    [
        # By seed the mean's difference is 5.5 and 5, then 8 and -6.
        ({"avgpool": (60, 61), "linear": (50, 51)}, {"avgpool": (51, 50), "linear": (50, 50)}, ["avgpool"]),
        ({"avgpool": (60, 41), "linear": (50, 51)}, {"avgpool": (51, 50), "linear": (45, 52)}, []),
        # With one seed 10 +-5.9 and 0 +-0 of a hundred questions, then 10 +-5.9 and -10 +-5.9.
        ({"avgpool": (60,), "linear": (50,)}, {"avgpool": (50,), "linear": (50,)}, ["avgpool"]),
        ({"avgpool": (61,), "linear": (50,)}, {"avgpool": (50,), "linear": (60,)}, []),
    ],
)
def test_the_best_mean_is_bold_by_the_difference_of_the_means(make, tmp_path, gqa, vqav2, bold):
    for name in ("avgpool", "linear"):
        for seed, (one, two) in enumerate(zip(gqa[name], vqav2[name], strict=True), start=1):
            run = tmp_path / f"{name}-{seed}"
            options = (f"projector={name}", f"seed={seed}", "evaluate.benchmarks='mini_gqa,mini_vqav2'")
            make.run(run, *options, benchmarks=("gqa", "vqav2"), n=100)
            _set_score(run, "mini_gqa", one)
            _set_score(run, "mini_vqav2", two)
    [grid] = score_tables(collect([tmp_path]), "")
    assert _bold(grid, "mean") == bold


def test_a_lead_is_bold_where_the_paper_names_the_row(make, tmp_path):
    options = (*PRISM, "backbone=clip_vit_l_336", "llm=phi2", "evaluate.benchmarks=gqa")
    for projector, value in (("avgpool", 60), ("c_abstractor", 40)):
        run = tmp_path / projector
        make.run(run, *options, f"projector={projector}", benchmarks=("gqa",), n=100)
        _set_score(run, "gqa", value)
    grid = next(one for one in score_tables(collect([tmp_path]), "") if one.table == 3)
    assert {row.row for row in grid.rows if row.group.cells} == {"B2"}
    assert _bold(grid, "gqa") == ["avgpool"]


def test_variants_of_one_projector_stand_in_the_order_of_their_names():
    variants = [f"qformer, projector.heads={heads}" for heads in range(9)]
    groups = [("T1", SeedGroup("T1", variant, ())) for variant in variants[::-1]]
    shown = [row.variant for row in _paper_rows(1, groups) if "heads" in row.variant]
    assert shown == variants
