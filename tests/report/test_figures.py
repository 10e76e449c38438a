"""What the figures draw, read from their axes before they become SVG."""

import json

import pytest

from prism_deco.report import figures, paper
from prism_deco.report.assemble import score_sections
from prism_deco.report.collect import collect
from prism_deco.report.grid import score_tables

PAPERS = ("backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "data=llava", "data.json=x.json")


@pytest.fixture
def drawn(monkeypatch):
    """Keeps matplotlib's figures as they are."""
    monkeypatch.setattr(figures, "to_svg", lambda figure: figure)


def _panels(figure):
    """Title -> label -> (x, y) of a figure's lines."""
    return {
        ax.get_title(): {line.get_label(): line.get_xydata().T for line in ax.get_lines()}
        | {c.get_label(): c.lines[0].get_xydata().T for c in ax.containers}
        for ax in figure.axes
    }


@pytest.mark.usefixtures("drawn")
def test_compression_has_all_its_points_in_one_figure(make, tmp_path):
    """The one with 144 tokens stands in the paper's Table 1, the others do not."""
    numbers, expected = (576, 256, 144, 64), {}
    for k in numbers:
        tokens = {"visual_in": 576, "visual_out": k}
        options = ("recipe=llava_v1_5_finetune", *PAPERS, f"recipe.num_tokens={k}", "evaluate.benchmarks=table1")
        scores = make.run(tmp_path / f"k{k}", *options, benchmarks=paper.COLUMNS[1], tokens=tokens)
        expected[k] = scores["gqa"]
    labels = [
        {"id": f"k{k}", "labels": {"recipe.num_tokens": k}, "overrides": [f"recipe.num_tokens={k}"]} for k in numbers
    ]
    make.ledger(tmp_path, labels)
    grids = score_tables(collect([tmp_path]), "")
    assert [(grid.table, len(grid.groups)) for grid in grids] == [(1, 1), (None, 3)]
    first, last = score_sections(grids, [[], []])
    assert not [figure for figure in first.figures if figure.name == "tokens"]
    [figure] = [figure for figure in last.figures if figure.name == "tokens"]
    x, y = _panels(figure.svg)["gqa"]["avgpool"]
    assert dict(zip(x, y, strict=True)) == pytest.approx(expected)


@pytest.mark.usefixtures("drawn")
def test_a_table_without_scores_takes_no_figure_from_the_others(make, tmp_path):
    """An alignment, say, that stands below them."""
    for k in (64, 36):
        tokens = {"visual_in": 64, "visual_out": k}
        make.run(tmp_path / "scored" / f"k{k}", f"recipe.num_tokens={k}", benchmarks=("gqa",), tokens=tokens)
    make.run(tmp_path / "other" / "a", "evaluate.benchmarks=null", benchmarks=())
    grids = [grid for name in ("scored", "other") for grid in score_tables(collect([tmp_path / name]), "")]
    assert [bool(grid.benchmarks) for grid in grids] == [True, False]
    scored, other = score_sections(grids, [[], []])
    assert "tokens" in [figure.name for figure in scored.figures]
    assert "tokens" not in [figure.name for figure in other.figures]


@pytest.mark.usefixtures("drawn")
def test_convergence_has_a_line_per_projector(make, tmp_path):
    for name in ("linear", "avgpool"):
        options = ("recipe=llava_v1_5_align", *PAPERS, f"projector={name}", "evaluate.benchmarks=null")
        make.run(tmp_path / name, *options, benchmarks=())
        loss = 3.0 if name == "linear" else 2.0
        rows = [{"step": step, "train/loss": loss if step > 78 else 9.0} for step in range(1, 81)]
        rows.append({"step": 80, "val/loss": loss + 0.5})
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    [grid] = score_tables(collect([tmp_path]), "")
    assert grid.table is None  # an alignment is no line of Table 1
    [panel] = _panels(figures.convergence(grid).svg).values()
    assert {name: line[1][0] for name, line in panel.items()} == {"linear": 9.0, "avgpool": 9.0}
    assert panel["avgpool"][1][-1] < panel["linear"][1][-1] < 9.0
    [section] = score_sections([grid], [[]])
    [table] = section.tables
    assert table.title == "Losses" and [figure.name for figure in section.figures] == ["convergence"]
    assert {row[0].text: (row[2].text, row[3].text) for row in table.rows if len(row) > 1} == {
        "linear": ("3.000", "3.500"),
        "avgpool": ("2.000", "2.500"),
    }


@pytest.mark.usefixtures("drawn")
def test_marks_stand_at_their_tokens_unless_they_would_cover_each_other(make, tmp_path):
    for name, tokens in (("avgpool", 16), ("maxpool", 16), ("linear", 64)):
        options = (f"projector={name}", "evaluate.benchmarks=mini_gqa")
        make.run(tmp_path / name, *options, benchmarks=("gqa",), tokens={"visual_in": 64, "visual_out": tokens})
    [grid] = score_tables(collect([tmp_path]), "")
    figure = figures.mean_figure(grid)
    [panel] = _panels(figure.svg).values()
    x = {name: line[0][0] for name, line in panel.items() if name in ("avgpool", "maxpool", "linear")}
    assert x["linear"] == 64 and x["avgpool"] < 16 < x["maxpool"]
    assert x["avgpool"] * x["maxpool"] == pytest.approx(16**2) and x["maxpool"] / x["avgpool"] < 1.1
    [front] = [line for line in figure.svg.axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    best = figures.pareto_front(figures.points(grid))
    assert list(front.get_xdata()) == [point.cost for point in best]


@pytest.mark.usefixtures("drawn")
def test_single_marks_are_not_moved(make, tmp_path):
    for name, numbers in (("avgpool", (4, 16, 64)), ("maxpool", (16,))):
        for k in numbers:
            options = (f"projector={name}", f"recipe.num_tokens={k}", "evaluate.benchmarks=mini_gqa")
            tokens = {"visual_in": 64, "visual_out": k}
            make.run(tmp_path / "both" / f"{name}{k}", *options, benchmarks=("gqa",), tokens=tokens)
            if name == "avgpool":
                make.run(tmp_path / "one" / f"{name}{k}", *options, benchmarks=("gqa",), tokens=tokens)
    for name, x in (("one", [4, 16, 64]), ("both", [4, 16 * 2**-0.045, 64])):
        [grid] = score_tables(collect([tmp_path / name]), "")
        [figure] = figures.tokens_figures(grid)
        assert _panels(figure.svg)["mini_gqa"]["avgpool"][0] == pytest.approx(x)
