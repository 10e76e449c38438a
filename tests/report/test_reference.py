"""The committed results are whole, and the texts beside them and in the README quote them."""

import csv
import re
import statistics
from pathlib import Path

import pytest
from scipy import stats  # comes with scikit-image

from prism_deco.sweep import parse
from prism_deco.sweep.expand import expand

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "runs" / "reference"
STUDY = REFERENCE / "study"
SWEEPS = ("study", "mini_projectors", "mini_compression", "mini_pooling", "mini_convergence")


def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(path):
    """Every Markdown table of a page: its rows without the heading, as stripped cells."""
    found = re.findall(r"^\|[ :|-]+\|\n((?:\|.*\|\n)+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [[[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in one.splitlines()] for one in found]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_of_a_sweep_is_in_its_report(name):
    cells = rows(REFERENCE / name / "cells.csv")
    assert {cell["state"] for cell in cells} == {"done"}
    assert {cell["cell"] for cell in cells} == {cell.id for cell in expand(parse([name]))}
    # One version of the code, whose results these are, and one world.
    assert len({cell["code_version"] for cell in cells}) == 1
    assert len({cell["data_hash"] for cell in cells}) == 1


@pytest.mark.parametrize("name", SWEEPS)
def test_a_page_names_no_machine(name):
    for path in (REFERENCE / name).rglob("*.*"):
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users)/", path.read_text(encoding="utf-8")), path


def verdicts():
    """Claim -> what equal -> its verdict, from the contrasts that judge it."""
    found = {}
    for row in rows(STUDY / "claims.csv"):
        if row["judged"] == "True":
            found.setdefault(row["claim"], {}).setdefault(row["equal"], set()).add(row["verdict"])
    for kinds in found.values():
        for equal, seen in kinds.items():
            both = {"holds", "reversed"} <= seen
            kinds[equal] = "mixed" if both else seen.pop() if len(seen) == 1 else "not resolved"
    return found


def test_the_verdicts_follow_from_the_intervals():
    for row in rows(STUDY / "claims.csv"):
        assert row["seeds"] == "1 2 3 4 5"
        null, low, high = -float(row["margin"]), float(row["low95"]), float(row["high95"])
        assert row["verdict"] == ("holds" if low > null else "reversed" if high < null else "not resolved")
        assert float(row["effect"]) == pytest.approx(float(row["first_mean"]) - float(row["second_mean"]), abs=1e-3)


def _side(scores, labels, measure):
    """Seed -> value of the runs of a side, from the scores of single runs."""
    wanted = dict(label.split("=") for label in labels.split())
    tokens = f", num_tokens={wanted['recipe.num_tokens']}" if "recipe.num_tokens" in wanted else ""
    values = {}
    for row in scores:
        mine = (row["part"], row["projector"], row["blind"]) == (wanted["part"], wanted["projector"], "False")
        if mine and row["row"].endswith(f"mini_qwen2{tokens}") and MEASURES[measure](row["measure"]):
            values.setdefault(row["seed"], []).append(float(row["value"]) * (1 if row["measure"] in NAMES else 100))
    return {seed: sum(its) / len(its) for seed, its in values.items()}


NAMES = {f"mini_{n}" for n in ("pope", "refcoco", "refcocoplus", "refcocog", "vizwiz", "vqav2", "gqa", "textvqa")}
MEASURES = {
    "mean": NAMES.__contains__,
    "boxes": lambda name: name.startswith("mini_refcoco"),
    "questions": lambda name: name in NAMES and not name.startswith("mini_refcoco"),
} | {name: f"relevance {name}".__eq__ for name in ("energy_in_box", "pointing", "query_redundancy", "query_spread")}


def test_effects_and_intervals_follow_from_the_scores_of_single_runs():
    scores, claims = rows(STUDY / "run_scores.csv"), rows(STUDY / "claims.csv")
    assert len(claims) == 58
    for row in claims:
        first, second = (_side(scores, row[side], row["measure"]) for side in ("first", "second"))
        assert first.keys() == second.keys() == set("12345")
        differences = [first[seed] - second[seed] for seed in first]
        low, high = stats.t.interval(0.95, 4, statistics.mean(differences), stats.sem(differences))
        expected = (statistics.mean(differences), low, high)
        assert [float(row[key]) for key in ("effect", "low95", "high95")] == pytest.approx(expected, abs=2e-3)
        p = stats.ttest_1samp(differences, -float(row["margin"])).pvalue
        assert float(row["p"]) == pytest.approx(p, rel=1e-2)


def test_what_stands_after_holm_s_adjustment_is_counted_right():
    claims = sorted(rows(STUDY / "claims.csv"), key=lambda row: float(row["p"]))
    stand = 0
    while float(claims[stand]["p"]) <= 0.05 / (len(claims) - stand):
        stand += 1
    assert [row["after_holm"] for row in claims] == ["True"] * stand + ["False"] * (len(claims) - stand)
    judging = [row for row in claims[:stand] if row["judged"] == "True"]
    assert {row["equal"] for row in judging} == {"compute"} and len(judging) == 3 and stand == 3 + 8
    text = " ".join((STUDY / "README.md").read_text(encoding="utf-8").split())
    assert "After Holm's adjustment for all 58 tests three of the contrasts that judge a claim stand" in text
    assert "So do eight details" in text and len(claims) == 58


@pytest.mark.parametrize("page", [ROOT / "README.md", STUDY / "README.md"])
def test_the_texts_quote_the_verdicts(page):
    expected = verdicts()
    table = next(table for table in tables(page) if table[0][0] in expected)
    assert [row[0] for row in table] == list(expected)
    for claim, steps, compute, *_ in table:
        assert steps.startswith(expected[claim]["steps"])
        assert compute.startswith(expected[claim].get("compute", "-"))


def quoted(text):
    return {" ".join(one.split()) for one in re.findall(r"[+-]\d+\.\d \([+-]\d+\.\d to\s[+-]\d+\.\d\)", text)}


def effects(**wanted):
    """Effects with intervals as a text has them, of the rows with these values."""
    return {
        f"{float(row['effect']):+.1f} ({float(row['low95']):+.1f} to {float(row['high95']):+.1f})"
        for row in rows(STUDY / "claims.csv")
        if all(row[key] == value for key, value in wanted.items())
    }


@pytest.mark.parametrize("page", [ROOT / "README.md", STUDY / "README.md"])
def test_the_texts_quote_the_effects(page):
    """Every effect with an interval in a text is one of the study's, and in the table one that judges that claim."""
    text = page.read_text(encoding="utf-8")
    assert quoted(text) and quoted(text) <= effects()
    claims = {row["claim"] for row in rows(STUDY / "claims.csv")}
    table = next(table for table in tables(page) if table[0][0] in claims)
    for claim, *cells in table:
        for equal, cell in zip(("steps", "compute"), cells, strict=True):
            assert quoted(cell) <= effects(claim=claim, equal=equal, judged="True"), (claim, equal)


def test_the_study_quotes_its_ladder():
    expected = {}
    for row in rows(STUDY / "ladder.csv"):
        expected.setdefault(row["projector"], []).append((float(row["value"]), f"{float(row['val_loss']):.3f}"))
    table = next(table for table in tables(STUDY / "README.md") if table[0][0] in expected)
    assert {row[0]: row[1:] for row in table} == {
        name: [loss for _, loss in sorted(expected[name])] for name in expected
    }


def _means(name):
    """Visual tokens or projector -> mean over the benchmarks, as the README prints it."""
    scores = {}
    for row in rows(REFERENCE / name / "scores.csv"):
        key = row["row"].partition("num_tokens=")[2] or row["projector"]
        scores.setdefault(key, []).append(float(row["score"]))
    assert {len(values) for values in scores.values()} == {8}
    return {key: f"{statistics.mean(values):.1f}" for key, values in scores.items()}


def test_the_readme_quotes_the_twins():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    printed = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    place = next(k for k, cells in enumerate(printed) if cells[0] == "`linear` (64 tokens)")
    projectors = _means("mini_projectors") | _means("mini_pooling")
    assert [projectors[cell.split("`")[1]] for cell in printed[place]] == printed[place + 2]
    tokens = _means("mini_compression")
    assert [tokens[key] for key in ("64", "36", "16", "9", "4")] == printed[place + 5]
    losses = {
        row["projector"]: f"{float(row['value']):.3f}" for row in rows(REFERENCE / "mini_convergence/run_scores.csv")
    }
    quoted = text.partition("at the end of the alignment")[2].partition("\n\n")[0]
    assert dict(re.findall(r"`(\w+)`\s(\d\.\d+)", quoted)) == losses and len(losses) == 5
