"""The committed results are whole, and the texts beside them and in the README quote them."""

import csv
import re
import statistics
from functools import cache
from pathlib import Path

import pytest

from prism_deco.sweep import parse
from prism_deco.sweep.expand import expand

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "runs" / "reference"
SWEEPS = ("mini_projectors", "mini_compression", "mini_pooling", "mini_convergence")


@cache
def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
    for path in [path for path in (REFERENCE / name).rglob("*.*") if path.suffix != ".pyc"]:
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", SWEEPS)
def test_scores_and_their_intervals_are_percentages(name):
    for row in rows(REFERENCE / name / "scores.csv"):
        assert 0 <= float(row["low95"]) <= float(row["score"]) <= float(row["high95"]) <= 100, row


def twin(name):
    """Visual tokens or projector -> mean over the benchmarks of a twin."""
    scores = {}
    for row in rows(REFERENCE / name / "scores.csv"):
        key = row["row"].partition("num_tokens=")[2] or row["projector"]
        scores.setdefault(key, []).append(float(row["score"]))
    assert {len(values) for values in scores.values()} == {8}
    return {key: statistics.mean(values) for key, values in scores.items()}


def test_the_readme_quotes_the_twins():
    text = (REFERENCE / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    place = next(k for k, cells in enumerate(lines) if cells[0] == "`linear` (64 tokens)")
    projectors = twin("mini_projectors") | twin("mini_pooling")
    assert [f"{projectors[cell.split('`')[1]]:.1f}" for cell in lines[place]] == lines[place + 2]
    tokens = twin("mini_compression")
    assert [f"{tokens[key]:.1f}" for key in ("64", "36", "16", "9", "4")] == lines[place + 5]
    at_the_end = {
        row["projector"]: f"{float(row['value']):.3f}" for row in rows(REFERENCE / "mini_convergence/run_scores.csv")
    }
    quoted = text.partition("at the end of the alignment")[2].partition("\n\n")[0]
    assert dict(re.findall(r"`(\w+)`\s(\d\.\d+)", quoted)) == at_the_end and len(at_the_end) == 5


def test_the_bench_page_states_the_differences_of_its_scores():
    means = {}
    for row in rows(REFERENCE / "mini_bench" / "scores.csv"):
        tokens = row["row"].rpartition("=")[2]
        means.setdefault((tokens, row["projector"]), []).append(float(row["score"]))
    page = (REFERENCE / "mini_bench" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(.+?)`.*?\| .*? \| \**([-+.\d]+)\** .*? \| \**([-+.\d]+)\** ", page, re.MULTILINE)
    assert {("16", name) for name, _, _ in lines} | {("16", "avgpool")} == {key for key in means if key[0] == "16"}
    for name, *stated in lines:
        for tokens, difference in zip(("16", "4"), stated, strict=True):
            expected = statistics.fmean(means[tokens, name]) - statistics.fmean(means[tokens, "avgpool"])
            assert float(difference) == pytest.approx(expected, abs=0.051), (name, tokens)
