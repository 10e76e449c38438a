"""Claims: what their YAML may say, and verdicts on planted effects, against scipy and sums made by hand."""

import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import claim_tables
import pytest
from claims import Claim, Contrast, parse_claims
from contrasts import Study, contrast_records, joint_verdict, t_test
from omegaconf import OmegaConf
from scipy import stats

from prism_deco.config import load_config
from prism_deco.report.cells import RunCell, Score
from prism_deco.report.comparability import training_flops
from prism_deco.report.stats import holm, seed_interval

NAMES = ["mini_refcoco", "mini_gqa"]
AVG = [40.0, 42.5, 39.0, 41.0, 43.5]
AVGPOOL, CABS = {"part": "steps", "projector": "avgpool"}, {"part": "steps", "projector": "c_abstractor"}


config_of = cache(lambda *overrides: load_config(overrides))


def make_cell(projector, seed, value, *overrides, part="steps", state="done", relevance=None, labels=(), **manifest):
    """A cell whose box benchmark scores `value` + 10 and whose question benchmark scores `value` - 10."""
    config = config_of(f"projector={projector}", *overrides)
    scores = {}
    if value is not None:
        content = {"data_hash": "q", "prompt_hash": "p"}
        pairs = zip(NAMES, (value + 10, value - 10), strict=True)
        scores = {"test": {name: Score(name, its, (0.0, 100.0), content, Path()) for name, its in pairs}}
    trained = {"data_hash": "d", "steps": 1050, "samples": 16_800, "tokens": {"visual_in": 64, "visual_out": 16}}
    return RunCell(
        id=f"{part}-{projector}-{seed}",
        folder=Path(),
        labels={"part": part, "projector": projector, "seed": str(seed), **dict(labels)},
        state=state,
        config=config,
        manifest=trained | manifest if state == "done" else {},
        scores=scores,
        relevance=relevance or {},
    )


def cells_of(projector, values, *overrides, **more):
    return [make_cell(projector, seed, value, *overrides, **more) for seed, value in enumerate(values, start=1)]


def run(cells, *contrasts):
    made = [Contrast(*one[:2], **one[2]) for one in contrasts]
    return contrast_records([Claim("a claim", made)], Study(cells, NAMES, "test"))


@pytest.mark.parametrize("count", range(2, 14))
def test_t_test_is_scipys(count):
    values = [3.0 * ((7 * k) % 5) - k for k in range(count)]
    for null in (0.0, -2.5, 1.0):
        assert t_test(values, null) == pytest.approx(stats.ttest_1samp(values, null).pvalue, abs=1e-12)
    assert t_test([2.0, 2.0]) == 0 and t_test([2.0, 2.0], 2.0) == 1 and t_test([0.1] * 3, 0.1) == 1


@pytest.mark.parametrize("null", [0.0, 1.5, 2.0, 4.3])
def test_the_test_and_the_interval_agree(null):
    """P is below 0.05 exactly where the interval leaves the null out."""
    for values in ([1.0, 2.0, 3.0], [1.9, 2.0, 2.05, 2.1], [-1.0, 5.0], [4.0, 4.1, 3.9, 4.05, 4.0]):
        low, high = seed_interval(values)
        assert (t_test(values, null) < 0.05) == (not low <= null <= high)


def test_an_effect_is_paired_by_seed():
    other = [30.0, 29.0, 31.0, 30.5, 30.0]
    cells = [*cells_of("avgpool", AVG), *cells_of("c_abstractor", other), *cells_of("linear", [90.0] * 5)]
    [result] = run(cells, (AVGPOOL, CABS, {}))
    gaps = [one - two for one, two in zip(AVG, other, strict=True)]
    test = stats.ttest_rel(AVG, other)
    low, high = test.confidence_interval(0.95)
    assert result["effect"] == pytest.approx(statistics.mean(gaps)) == pytest.approx(11.1)
    assert (result["low95"], result["high95"]) == pytest.approx((low, high)) and result["p"] == pytest.approx(
        test.pvalue
    )
    assert result["verdict"] == "holds" and result["seeds"] == "1 2 3 4 5" and result["notes"] == ""
    first = (result["first_mean"], result["first_deviation"])
    assert first == pytest.approx((statistics.mean(AVG), statistics.stdev(AVG)))
    assert result["second_mean"] == pytest.approx(30.1) and result["blind_mean"] is None
    assert claim_tables.pair(result) == "steps avgpool − steps c_abstractor"  # noqa: RUF001
    # Table 1 over all columns but SEED and MME, by hand.
    assert result["paper_table1"] == pytest.approx((441.1 - 425.0) / 8)


def test_reversed_and_unresolved_are_told_apart():
    cells = [*cells_of("avgpool", AVG), *cells_of("linear", [value - 3 for value in AVG])]
    cells += cells_of("c_abstractor", [41.0, 41.0, 41.0, 41.0, 41.0])
    ahead, behind, near = run(
        cells,
        (AVGPOOL, {"projector": "linear"}, {}),
        ({"projector": "linear"}, AVGPOOL, {}),
        (AVGPOOL, CABS, {}),
    )
    assert [one["verdict"] for one in (ahead, behind, near)] == ["holds", "reversed", "not resolved"]
    assert near["low95"] < 0 < near["high95"] and near["p"] > 0.05
    assert joint_verdict([ahead]) == "holds" and joint_verdict([behind]) == "reversed"
    assert joint_verdict([ahead, behind, near]) == "mixed" and joint_verdict([ahead, near]) == "not resolved"


@pytest.mark.parametrize(("loss", "expected"), [(1.0, "holds"), (2.5, "not resolved"), (5.0, "reversed")])
def test_not_less_is_judged_by_its_margin(loss, expected):
    jitter = [-0.3, 0.2, 0.1, -0.1, 0.1]
    other = [value + loss + move for value, move in zip(AVG, jitter, strict=True)]
    cells = [*cells_of("avgpool", AVG), *cells_of("linear", other)]
    [result] = run(cells, (AVGPOOL, {"projector": "linear"}, {"expect": "not_less", "margin": 2.5}))
    assert result["verdict"] == expected and result["effect"] == pytest.approx(-loss)
    gaps = [one - two for one, two in zip(AVG, other, strict=True)]
    assert result["p"] == pytest.approx(stats.ttest_1samp(gaps, -2.5).pvalue)


def test_holm_is_over_all_contrasts_of_all_claims():
    cells = [*cells_of("avgpool", AVG), *cells_of("c_abstractor", [30.0, 29.0, 31.0, 30.5, 30.0])]
    cells += [*cells_of("qformer", [38.0, 41.0, 38.0, 40.0, 38.0]), *cells_of("d_abstractor", [None] * 5)]
    contrasts = [Contrast(AVGPOOL, {"projector": name}) for name in ("c_abstractor", "qformer", "d_abstractor")]
    results = contrast_records([Claim(str(k), [one]) for k, one in enumerate(contrasts)], Study(cells, NAMES, "test"))
    first, second, none = results
    assert none["p"] is None and none["p_holm"] is None and not none["after_holm"]
    assert [first["p_holm"], second["p_holm"]] == holm([first["p"], second["p"]])
    assert first["p_holm"] == pytest.approx(2 * first["p"]) and second["p_holm"] == pytest.approx(second["p"])


def test_missing_seeds_are_left_out_of_both_arms_and_named():
    cells = cells_of("avgpool", [40.0, 42.0, None, 41.0, 90.0])[:4]
    cells += [*cells_of("c_abstractor", [30.0, 31.0, 29.0])]
    cells += [make_cell("c_abstractor", 4, None, state="failed"), make_cell("c_abstractor", 5, None, state="planned")]
    [result] = run(cells, (AVGPOOL, CABS, {}))
    assert (result["seeds"], result["planned_seeds"], result["effect"]) == ("1 2", 5, pytest.approx(10.5))
    assert (result["low95"], result["high95"]) == pytest.approx((10.5 - 12.7062 * 0.5, 10.5 + 12.7062 * 0.5))
    assert result["notes"].split("; ") == [
        "part=steps projector=avgpool: seed 3 not measured",
        "part=steps projector=avgpool: seed 5 not planned",
        "part=steps projector=c_abstractor: seed 4 failed",
        "part=steps projector=c_abstractor: seed 5 planned",
    ]
    # Means are over all of an arm's own seeds.
    assert result["second_mean"] == pytest.approx(30.0) and result["first_mean"] == pytest.approx(41.0)


def test_one_common_seed_has_no_interval_and_none_no_effect():
    cells = [*cells_of("avgpool", AVG[:1]), *cells_of("c_abstractor", [10.0])]
    one, none = run(cells, (AVGPOOL, CABS, {}), (AVGPOOL, {"part": "steps", "projector": "qformer"}, {}))
    assert (one["effect"], one["low95"], one["p"], one["verdict"]) == (30.0, None, None, "not resolved")
    assert one["notes"] == "one seed has no interval"
    assert none["effect"] is None and none["verdict"] == "not resolved"
    assert none["notes"] == "no cell has the labels part=steps projector=qformer"
    heading, row = claim_tables.contrasts_table([none]).rows
    assert heading[0].text == "a claim" and row[0].lines == (none["notes"],)
    assert (row[1].text, row[4].text) == ("not resolved", "-")


def test_the_blind_model_stands_beside_and_is_never_taken_for_its_projector():
    blind = {"labels": {"recipe.blind": "True"}}
    cells = [*cells_of("avgpool", AVG), *cells_of("c_abstractor", [23.0, 22.0, 24.0, 23.5, 22.5])]
    cells += cells_of("avgpool", [23.5, 21.0, 24.5, 23.0, 22.0], "recipe.blind=true", **blind)
    seen, above = run(cells, (AVGPOOL, CABS, {}), (AVGPOOL, {**AVGPOOL, "recipe.blind": "True"}, {}))
    assert seen["blind_mean"] == pytest.approx(22.8) and seen["effect"] == pytest.approx(41.2 - 23.0)
    assert seen["notes"] == "part=steps projector=c_abstractor is not clearly above the blind model"
    assert above["effect"] == pytest.approx(41.2 - 22.8)


def test_boxes_questions_and_relevance_are_measures_of_their_own():
    maps = {"methods": {"r-gae": {"energy_in_box": {"mean": 0.3}}, "raw": {"energy_in_box": {"mean": 0.9}}}}
    less = {"methods": {"r-gae": {"energy_in_box": {"mean": 0.25}}}}
    cells = [*cells_of("avgpool", AVG, relevance=maps), *cells_of("c_abstractor", [30.0] * 5, relevance=less)]
    boxes, questions, energy = run(cells, (AVGPOOL, CABS, {"measures": ["boxes", "questions", "energy_in_box"]}))
    assert boxes["first_mean"] == pytest.approx(51.2) and questions["first_mean"] == pytest.approx(31.2)
    assert (boxes["judged"], questions["judged"], energy["judged"]) == (True, False, False)
    assert (energy["first_mean"], energy["effect"], energy["paper_table1"]) == (
        pytest.approx(30),
        pytest.approx(5),
        None,
    )
    assert boxes["paper_table1"] == pytest.approx((43.4 + 38.5 + 39.3 - 40.6 - 34.3 - 38.4) / 3)
    assert (boxes["unit"], energy["unit"]) == ("points", "hundredths")


@pytest.mark.parametrize(
    ("change", "note"),
    [({"data_hash": "other"}, "the training data differ"), ({"steps": 714}, "the steps differ")],
)
def test_arms_that_saw_different_things_have_no_effect(change, note):
    cells = [*cells_of("avgpool", AVG), *cells_of("c_abstractor", [30.0] * 5, **change)]
    [result] = run(cells, (AVGPOOL, CABS, {}))
    assert (result["effect"], result["verdict"], result["notes"]) == (None, "not resolved", note)


def test_relevance_of_other_questions_does_not_compare():
    maps = {"methods": {"r-gae": {"pointing": {"mean": 0.3}}}, "split": "test"}
    cells = [
        *cells_of("avgpool", AVG, relevance=maps),
        *cells_of("c_abstractor", AVG, relevance=maps | {"split": "val"}),
    ]
    [result] = run(cells, (AVGPOOL, CABS, {"measures": ["pointing"]}))
    assert result["notes"] == "the questions differ"


def test_equal_compute_is_checked_by_arithmetic():
    # 64 visual tokens cost half as much again as 16: the linear projector gets two thirds of the steps.
    fewer, all_of_them = {"steps": 714, "samples": 11_424}, {"steps": 1050, "samples": 16_793}
    cells = cells_of("avgpool", AVG, **all_of_them)
    cells += cells_of("linear", [30.0] * 5, part="compute", **fewer)
    cells += cells_of("linear", [30.0] * 5, **all_of_them)
    equal, unequal = run(
        cells,
        (AVGPOOL, {"part": "compute", "projector": "linear"}, {"equal": "compute"}),
        (AVGPOOL, {"part": "steps", "projector": "linear"}, {"equal": "compute"}),
    )
    assert equal["verdict"] == "holds" and equal["notes"] == ""
    assert unequal["effect"] is None and unequal["notes"] == "the compute of the training differs"


def test_what_runs_of_other_versions_cost():
    whole = make_cell("avgpool", 1, 40.0)
    older, bare = (OmegaConf.create(OmegaConf.to_container(whole.config, resolve=True)) for _ in range(2))
    del older.trainer["reduce_dtype"]  # of a version that did not know it
    del bare.data["statistics"]  # nor what is in the data
    # 80 tokens of text per record, 20 of them supervised; 20,000 of 20,994 records show an image, as 16 tokens.
    images = 20_000 / 20_994
    positions = 80 + 16 * images
    tower, mlp, position, pair, target = 79_036_416, 2_433_024, 3_833_856, 4_608, 442_368
    by_hand = images * (tower + mlp) + positions * position + positions**2 * pair + 20 * target
    assert training_flops(whole) == pytest.approx(16_800 * by_hand, rel=1e-6)
    assert training_flops(replace(whole, config=older)) == training_flops(whole)
    assert training_flops(replace(whole, config=bare)) is training_flops(replace(whole, manifest={})) is None


def test_labels_name_the_arms():
    tokens = {"visual_in": 64, "visual_out": 36}
    labels = {"recipe.num_tokens": "36"}
    cells = [*cells_of("avgpool", AVG), *cells_of("avgpool", AVG, part="tokens", tokens=tokens, labels=labels)]
    [result] = run(cells, (AVGPOOL, {"part": "tokens", "projector": "avgpool", "recipe.num_tokens": "36"}, {}))
    assert claim_tables.pair(result) == "steps avgpool − tokens avgpool 36"  # noqa: RUF001
    assert result["paper_table1"] is None  # whose projectors are as they are


def test_labels_of_two_cells_of_a_seed_are_refused():
    cells = [*cells_of("avgpool", AVG), *cells_of("avgpool", AVG, part="tokens")]
    with pytest.raises(ValueError, match="means either steps-avgpool-1 or tokens-avgpool-1"):
        run(cells, ({"projector": "avgpool"}, CABS, {}))


def test_a_contrast_that_cannot_fail_judges_nothing():
    low = [value - 20 for value in AVG]
    cells = [*cells_of("avgpool", low), *cells_of("c_abstractor", AVG)]
    results = run(cells, (AVGPOOL, CABS, {}), (CABS, AVGPOOL, {"judges": False}))
    assert [(one["verdict"], one["judged"]) for one in results] == [("reversed", True), ("holds", False)]
    [row] = claim_tables.claims_table([Claim("a claim")], results).rows
    assert row[1].text == "reversed"  # with the other it would be mixed


def test_a_yaml_of_claims():
    sides = {"first": {"part": "steps"}, "second": {"recipe.num_tokens": 36, "recipe.blind": True}}
    [claim] = parse_claims([{"name": "n", "paper": "two\n  lines", "contrasts": [sides | {"measures": ["boxes"]}]}])
    assert claim.paper == "two\n  lines" and claim.note == ""
    [contrast] = claim.contrasts
    assert contrast.second == {"recipe.num_tokens": "36", "recipe.blind": "True"}
    assert (contrast.measures, contrast.expect, contrast.margin, contrast.equal) == (["boxes"], "greater", 0, "steps")
    [claim] = parse_claims([{"name": "n", "contrasts": [sides | {"expect": "not_less", "margin": 2}]}])
    assert claim.contrasts[0].margin == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": ["men"]}, "Unknown measure of the claim 'n' 'men'. Did you mean 'mean'"),
        ({"expect": "less"}, "Invalid value 'less'.*full_key: expect"),
        ({"equal": "time"}, "Invalid value 'time'.*full_key: equal"),
        ({"margins": 1}, "Key 'margins' not in 'Contrast'. Did you mean: 'margin'"),
        ({"margin": "wide"}, "could not be converted to Float.*full_key: margin"),
        ({"margin": 1}, "go together"),
        ({"expect": "not_less"}, "go together"),
        ({"second": {}}, "what is first and what is second"),
        ({"judges": "perhaps"}, "not a valid bool.*full_key: judges"),
    ],
)
def test_a_wrong_yaml_says_what_is_wrong(change, message):
    sides = {"first": {"part": "steps"}, "second": {"part": "tokens"}}
    with pytest.raises(ValueError, match=message):
        parse_claims([{"name": "n", "contrasts": [sides | change]}])


@pytest.mark.parametrize("content", [{}, {"name": "n"}, {"name": "n", "contrasts": [3]}, 3, {"nam": "n"}])
def test_claims_that_are_none(content):
    with pytest.raises(ValueError, match="no name|no contrasts|not a subclass of Contrast"):
        parse_claims([content])
