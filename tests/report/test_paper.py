"""The paper's numbers, counted by the report's own code, against counts made here."""

import csv
from dataclasses import replace

import pytest

from prism_deco.config import load_config
from prism_deco.report import paper
from prism_deco.report.cells import RunCell
from prism_deco.report.stats import Wins, count_wins


def _rows(table):
    with (paper.FOLDER / f"table{table}.csv").open() as file:
        return list(csv.DictReader(file))


def test_table_3_holds_96_numbers_of_six_settings():
    lines = paper.rows(3)
    numbers = [value for line in lines for value in line.scores.values()]
    printed = [float(row[name]) for row in _rows(3) for name in paper.COLUMNS[3]]
    assert len(numbers) == 96 and sorted(numbers) == sorted(printed)
    assert {(line.setting, line.projector) for line in lines} == {
        (f"B{k}", name) for k in range(1, 7) for name in ("avgpool", "c_abstractor")
    }
    b3 = next(line for line in lines if (line.setting, line.projector) == ("B3", "avgpool"))
    assert (b3.backbone, b3.llm, b3.tokens) == ("siglip_so400m_384", "phi2", 144)
    assert b3.scores["pope"] == 81.7 and b3.scores["vizwiz"] == 39.5


def test_average_pooling_is_ahead_in_45_of_the_papers_48_places():
    scores = paper.scores(3)
    ours, theirs = (
        {
            (setting, name): value
            for (setting, p), line in scores.items()
            if p == projector
            for name, value in line.items()
        }
        for projector in ("avgpool", "c_abstractor")
    )
    assert count_wins(ours, theirs) == Wins(ahead=45, behind=2, tied=1, missing=0)
    pairs = list(zip(_rows(3)[1::2], _rows(3)[::2], strict=True))
    assert all((a["projector"], c["projector"]) == ("AdaptiveAvgPool", "C-Abstractor") for a, c in pairs)
    ahead = sum(float(a[name]) > float(c[name]) for a, c in pairs for name in paper.COLUMNS[3])
    behind = {(a["setting"], name) for a, c in pairs for name in paper.COLUMNS[3] if float(a[name]) < float(c[name])}
    assert ahead == 45 and behind == {("B3", "vizwiz"), ("B4", "vizwiz")}


def test_the_gains_of_the_abstract_follow_from_table_1():
    scores = paper.scores(1)
    gains = paper.gains(scores["T1", "avgpool"], scores["T1", "c_abstractor"])
    stated = {"multimodal benchmarks": 0.9, "visual localization": 7.1, "open-ended VQA": 2.9}
    assert gains == pytest.approx(stated, abs=0.1)
    assert gains["visual localization"] == pytest.approx(
        100 * ((43.4 - 40.6) / 40.6 + (38.5 - 34.3) / 34.3 + (39.3 - 38.4) / 38.4) / 3
    )
    without = {name: value for name, value in scores["T1", "avgpool"].items() if name != "mme"}
    assert paper.gains(without, scores["T1", "c_abstractor"])["multimodal benchmarks"] is None


def test_table_1_holds_its_cited_line_and_table_2_the_averages():
    lines = paper.rows(1)
    assert len(lines) == 6 and all(len(line.scores) == 10 for line in lines)
    assert [line.projector for line in lines if line.cited] == ["linear"]
    assert paper.scores(1)["T1", "linear"]["mme"] == 1338.6
    assert {line.tokens for line in lines} == {144, 576}
    assert paper.spatial_averages() == {"linear": 56.4, "qformer": 40.9, "c_abstractor": 54.4, "avgpool": 56.0}


@pytest.mark.parametrize(
    ("overrides", "table", "setting"),
    [
        (["backbone=siglip_so400m_224", "llm=phi2"], 3, "B1"),
        (["backbone=clip_vit_l_336", "llm=phi2", "projector=maxpool"], 3, "B2"),
        (["backbone=dinov2_siglip_384", "llm=vicuna_7b_v1_5", "projector=c_abstractor"], 3, "B6"),
        (["backbone=siglip_so400m_224", "llm=phi2", "recipe.num_tokens=64"], 3, None),
        (["backbone=siglip_so400m_224", "llm=phi2", "backbone.image_size=384"], 3, None),
        (["backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5"], 3, None),
        (["backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "projector=linear"], 1, "T1"),
        (["backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "recipe.num_tokens=576"], 1, None),
        (["backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "recipe=prism"], 1, None),
        (["backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5", "recipe=llava_v1_5_align"], 1, None),
        (["backbone=clip_vit_l_336", "llm=phi2", "recipe=llava_v1_5_finetune"], 3, None),
        (["backbone=mini_siglip", "llm=mini_phi"], 3, None),
        (["backbone=clip_vit_l_336", "llm=phi2", "projector=linear"], 3, "B2"),
    ],
)
def test_a_cell_finds_its_setting_by_what_it_is(tmp_path, overrides, table, setting):
    recipe = {1: "llava_v1_5_finetune", 3: "prism"}[table]
    config = load_config([f"recipe={recipe}", *overrides])
    cell = RunCell("x", tmp_path, {"projector": config.projector.name, "row": "B1"}, "planned", config=config)
    assert paper.setting(cell, table) == setting
    tokens = {"visual_in": 576, "visual_out": config.projector.num_tokens or 576}
    assert paper.setting(replace(cell, state="done", manifest={"tokens": tokens}), table) == setting
