"""The script of the registered study: what it runs, what it goes on with, and its tests of the claims."""

import csv
import json
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import fmean

import pytest
import study
from scipy import stats
from study import (
    COLUMNS,
    CONTRASTS,
    HERE,
    SCORES,
    alone,
    arm_of,
    arms_table,
    best_rate,
    by_seed,
    claim_records,
    claims_table,
    command_of,
    ladder_table,
    main,
    read_runs,
    report,
    run,
)

from prism_deco.config import load_config
from prism_deco.plan.estimate import estimate_run
from prism_deco.report.stats import seed_interval
from prism_deco.sweep import parse
from prism_deco.sweep.expand import expand

SEEDS = ("1", "2", "3", "4", "5", "6")
CELLS = expand(parse(["study"]))


def line(arm, seed, **values):
    row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(SCORES, "50.0")
    return row | {"cell": f"{arm}-seed{seed}", "arm": arm, "seed": seed, "data_hash": "d", "val_loss": "0.5"} | values


def planted(rng):
    """A runs.csv of all that is tested: random scores, and one arm far ahead of another."""
    runs = {}
    for cell in CELLS:
        arm, seed = arm_of(cell), str(cell.config.seed)
        scores = {name: f"{rng.gauss(60 if arm == 'steps-avgpool' else 40, 3):.4f}" for name in SCORES}
        more = {"energy_in_box": f"{rng.gauss(20, 3):.4f}", "probe": f"{rng.gauss(80, 3):.4f}", "cpu_seconds": "100"}
        more |= {"lr": cell.settings.get("recipe.lr", "0.0015"), "val_loss": f"{rng.gauss(0.8, 0.1):.4f}"}
        runs[cell.id] = line(arm, seed, **scores, **more) | {"cell": cell.id}
        if "ladder" in arm:
            runs[cell.id] |= dict.fromkeys(SCORES, "")
    return runs


def write(path, runs):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(runs.values())


def test_every_contrast_is_of_arms_of_the_sweep_with_the_same_seeds():
    seeds = {}
    for cell in CELLS:
        seeds.setdefault(arm_of(cell), set()).add(str(cell.config.seed))
    for contrast in CONTRASTS:
        for arm in (contrast.first, contrast.second, *(contrast.minus or ())):
            assert seeds[arm] == set(SEEDS), arm
    assert {number.split()[0] for number in (one.claim for one in CONTRASTS)} == {str(k) for k in range(1, 11)}
    tuned = {arm: found for arm, found in seeds.items() if "ladder" in arm}
    assert len(tuned) == 8 and all(found == {"11", "12"} for found in tuned.values())
    assert {cell.config.evaluate.split for cell in CELLS if "ladder" not in cell.id} == {"test"}


def test_equal_compute_is_equal_to_a_percent():
    def flops(arm):
        return next(estimate_run(cell.config).needs.flops for cell in CELLS if arm_of(cell) == arm)

    spent = flops("steps-avgpool")
    assert flops("compute-linear") == pytest.approx(spent, rel=0.01)
    # At equal steps the others have more.
    for name in ("linear", "qformer", "c_abstractor", "d_abstractor"):
        assert flops(f"steps-{name}") > 1.03 * spent


def test_a_rate_is_chosen_by_the_mean_over_seeds_when_all_have_run():
    ladder = [cell for cell in CELLS if cell.part == "ladder"]
    losses = {("0.00075", "11"): 0.7, ("0.00075", "12"): 0.9, ("0.0015", "11"): 0.75, ("0.0015", "12"): 0.76}
    losses |= {("0.003", "11"): 0.1, ("0.003", "12"): 1.9}
    runs = {}
    for cell in ladder:
        if arm_of(cell) == "ladder-qformer":
            rate = str(cell.config.recipe.lr)
            seed = str(cell.config.seed)
            runs[cell.id] = line("ladder-qformer", seed, lr=rate, val_loss=str(losses[rate, seed]))
    assert float(best_rate("ladder-qformer", ladder, runs)) == 0.0015
    waiting = next(cell for cell in CELLS if cell.id == "steps-qformer-seed3")
    settings = dict(one.split("=", 1) for one in command_of(waiting, CELLS, runs))
    assert load_config([f"{key}={value}" for key, value in settings.items()]).recipe.lr == 0.0015
    runs.popitem()
    assert best_rate("ladder-qformer", ladder, runs) is None
    assert command_of(waiting, CELLS, runs) is None
    blind = next(cell for cell in CELLS if cell.id == "steps-avgpool-blind-seed1")
    assert command_of(blind, CELLS, runs) is None


def test_the_tests_by_scipy_and_holm_by_hand(tmp_path):
    runs = planted(random.Random(3))
    records = claim_records(runs)
    first = [sum(float(runs[f"steps-avgpool-seed{s}"][name]) for name in SCORES) / 8 for s in SEEDS]
    second = [sum(float(runs[f"steps-c_abstractor-seed{s}"][name]) for name in SCORES) / 8 for s in SEEDS]
    expected = stats.ttest_rel(first, second)
    assert records[0]["p"] == pytest.approx(expected.pvalue)
    assert (records[0]["low95"], records[0]["high95"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert records[0]["verdict"] == "holds" and records[3]["verdict"] == "reversed"
    scratch = [
        sum(float(runs[f"scratch-{p}-seed{s}"][n]) for n in SCORES) / 8 * sign
        for s in SEEDS
        for p, sign in (("avgpool", 1), ("c_abstractor", -1))
    ]
    gains = [a - b - scratch[2 * k] - scratch[2 * k + 1] for k, (a, b) in enumerate(zip(first, second, strict=True))]
    assert records[-1]["effect"] == pytest.approx(sum(gains) / 6)
    margin = next(one for one in records if one["null"] == 2.5)
    four = [sum(float(runs[f"tokens-avgpool-4-seed{s}"][name]) for name in SCORES) / 8 for s in SEEDS]
    assert margin["p"] == pytest.approx(stats.ttest_rel(first, [value + 2.5 for value in four]).pvalue)
    ordered = sorted(records, key=lambda one: one["p"])
    highest = 0.0
    for rank, one in enumerate(ordered):
        highest = max(highest, min(1.0, one["p"] * (len(ordered) - rank)))
        assert one["p_holm"] == pytest.approx(highest)
        assert (one["verdict"] == "not resolved") == (highest >= 0.05)

    write(tmp_path / "runs.csv", runs)
    page = report(tmp_path)
    assert page.count("\n\n") == 2 and "<svg" in (tmp_path / "claims.svg").read_text()
    assert len((tmp_path / "claims.csv").read_text().splitlines()) == 1 + len(CONTRASTS)
    assert f"{records[0]['effect']:+.1f}" in page.splitlines()[2]
    # A p is never 0.
    clear = [{**records[0], "p_holm": p} for p in (0.0004, 0.00099, 0.001)]
    assert re.findall(r"\| (<?\d\.\d+) \|", claims_table(clear)) == ["<0.001", "<0.001", "0.001"]


def test_an_arm_that_has_not_learnt_to_see_is_named_before_the_verdict():
    runs = {cell: row | {"val_loss": "0.6"} for cell, row in planted(random.Random(3)).items()}
    for seed in SEEDS:
        runs[f"steps-avgpool-blind-seed{seed}"]["val_loss"] = str(0.8 + int(seed) / 100)
    assert all(not one["unseeing"] for one in claim_records(runs))
    runs["steps-c_abstractor-seed5"]["val_loss"] = "0.815"  # above the lowest of the blind model's, 0.81
    runs["steps-qformer-seed5"]["val_loss"] = "0.805"
    records = claim_records(runs)
    assert {one["unseeing"] for one in records} == {"", "steps-c_abstractor"}
    assert "| steps-c_abstractor not having learnt to see, holds |" in claims_table(records)


def test_a_loss_clearly_within_the_margin_reverses_the_claim_of_a_larger_one():
    runs = planted(random.Random(3))
    for seed in SEEDS:  # 4 tokens lose 1 point
        first = runs[f"steps-avgpool-seed{seed}"]
        less = {name: str(float(first[name]) - 1 - int(seed) / 1000) for name in SCORES}
        runs[f"tokens-avgpool-4-seed{seed}"] |= less
    record = next(one for one in claim_records(runs) if one["null"] == 2.5)
    assert 0 < record["effect"] < 2.5 and record["verdict"] == "reversed"


def test_unfinished_arms_and_different_data_are_errors_of_the_user():
    runs = planted(random.Random(1))
    del runs["steps-linear-seed4"]
    with pytest.raises(ValueError, match=r"not every seed of steps-linear, steps-avgpool has run yet"):
        claim_records(runs)
    runs = planted(random.Random(1))
    runs["steps-linear-seed4"]["data_hash"] = "other"
    with pytest.raises(ValueError, match="saw different data"):
        claim_records(runs)


def cut(text):
    return text[:-30]


def repeat_a_line(text):
    return text + text.splitlines(keepends=True)[3]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cut, "line 115 is cut"),
        (lambda text: text[:-1], "line 115 is cut"),
        (lambda text: text.replace("0.5", "1,5", 1), "line 2 is cut or too long"),
        (repeat_a_line, "line 116 repeats the cell ladder-avgpool-lr0.0015-seed11"),
        (lambda text: text.replace("cell,arm", "Cell,arm"), "its columns"),
        (lambda text: "", "its columns"),
        (lambda text: text.replace("50.0", "fifty", 1), "mini_refcoco is 'fifty' in line 2"),
        (lambda text: text.replace("50.0", "nan", 1), "mini_refcoco is 'nan' in line 2"),
        (lambda text: text.replace(",0.5,", ",,", 1), "val_loss is '' in line 2"),
    ],
)
def test_a_damaged_table_is_named_instead_of_tested(tmp_path, edit, message):
    table = tmp_path / "runs.csv"
    runs = {cell.id: line(arm_of(cell), cell.config.seed, code_version="v") | {"cell": cell.id} for cell in CELLS}
    write(table, runs)
    text = table.read_text().replace("\r\n", "\n")
    table.write_text(text)
    assert len(read_runs(table)) == len(CELLS)
    table.write_text(edit(text))
    with pytest.raises(ValueError, match=re.escape(str(table)) + ".*" + message):
        read_runs(table)


def test_a_line_without_what_is_tested_is_named():
    runs = planted(random.Random(1))
    runs["steps-avgpool-seed2"]["probe"] = ""
    with pytest.raises(ValueError, match=r"steps-avgpool-seed2 has no probe"):
        claim_records(runs)


def test_nothing_runs_that_would_lose_lines_or_that_nobody_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "_measured", lambda *_: pytest.fail("a cell was run"))
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    table = tmp_path / "runs.csv"

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments, "--folder", str(tmp_path)])
        assert main() == 2
        return capsys.readouterr().err

    assert "Unknown arm 'step-avgpool'. Did you mean 'steps-avgpool'" in refused("run", "step-avgpool")
    assert "steps-avgpool chooses its learning rate by the part ladder" in refused("run", "steps-avgpool")
    assert "runs.csv has no cells" in refused("report")
    write(table, planted(random.Random(1)))
    before = table.read_bytes()
    assert "runs.csv has 113 cells that the sweep tiny.yaml does not have" in refused("run", "--sweep", "tiny.yaml")
    assert table.read_bytes() == before
    assert "neither sets nor chooses recipe.lr" in refused("run", "--sweep", "mini")
    with alone(tmp_path):
        assert "Another process runs a study into" in refused("run")
    monkeypatch.setattr(sys, "argv", ["study.py", "run", "--jobs", "0"])
    with pytest.raises(SystemExit):
        main()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["study.py", "run", "--folder", str(tmp_path / "file")])
    assert main() == 2


def test_an_interrupted_study_stops_its_trainings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    training = tmp_path / "training"
    training.write_text("#!/bin/sh\necho $$ >> started\nexec sleep 60\n")
    training.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(training))
    monkeypatch.setattr(sys, "argv", ["study.py", "run", "--sweep", "tiny.yaml", "--folder", ".", "--jobs", "1"])
    earlier = signal.getsignal(signal.SIGTERM)

    def stop_when_started():
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_when_started)
    began = time.monotonic()
    try:
        stopper.start()
        assert main() == 130
    finally:
        signal.signal(signal.SIGTERM, earlier)
        stopper.join()
    assert time.monotonic() - began < 30
    (started,) = (tmp_path / "started").read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started), 0)
    assert "the same command continues" in capsys.readouterr().err


SWEEP = """
settings: {trainer.threads: 1, recipe.max_steps: 2, data.train_images: 48, data.val_images: 24, data.test_images: 24,
  data.val_items: 6, data.test_items: 6, trainer.checkpoint_every: 1}
parts:
  ladder:
    settings: {evaluate.benchmarks: null}
    rows: [{labels: {projector: avgpool}, settings: {projector: avgpool}}]
    axes: {recipe.lr: [1.0e-3, 2.0e-3], seed: [11]}
  steps:
    choose: {recipe.lr: ladder}
    settings: {evaluate.split: test, evaluate.relevance: mini_refcoco, evaluate.relevance_limit: 4}
    rows: [{labels: {projector: avgpool}, settings: {projector: avgpool}}]
    axes: {seed: [1]}
"""


@pytest.mark.slow
def test_a_study_goes_on_with_what_its_table_does_not_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "PROBED", ())
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    table = tmp_path / "runs.csv"
    run("tiny.yaml", table, 1)
    runs = read_runs(table)
    assert list(runs) == ["ladder-avgpool-lr0.001-seed11", "ladder-avgpool-lr0.002-seed11", "steps-avgpool-seed1"]
    best = min(list(runs.values())[:2], key=lambda row: float(row["val_loss"]))
    last = runs["steps-avgpool-seed1"]
    assert last["lr"] == best["lr"] and float(last["cpu_seconds"]) > 0
    metrics = json.loads((tmp_path / "runs/tiny/steps-avgpool-seed1/eval/mini_gqa-test/metrics.json").read_text())
    assert float(last["mini_gqa"]) == pytest.approx(metrics["metrics"][metrics["primary"]])
    maps = json.loads((tmp_path / "runs/tiny/steps-avgpool-seed1/explain/mini_refcoco-test/metrics.json").read_text())
    assert float(last["energy_in_box"]) == pytest.approx(100 * maps["methods"]["r-gae"]["energy_in_box"]["mean"])
    # On another machine there is the table alone.
    del runs["steps-avgpool-seed1"]
    write(table, runs)
    run("tiny.yaml", table, 1, ["steps-avgpool"])
    again = read_runs(table)
    # The seconds of a run that another call began are not known.
    assert again["steps-avgpool-seed1"] == last | {"cpu_seconds": ""}
    assert list(again) == [*runs, "steps-avgpool-seed1"]
    # A cell that cannot be read counts as failed, and leaves the others.
    folder = tmp_path / "runs/tiny/steps-avgpool-seed1"
    write(table, runs)
    (folder / "eval/mini_gqa-test/metrics.json").write_text("{")
    with pytest.raises(ValueError, match="steps-avgpool-seed1 failed"):
        run("tiny.yaml", table, 1)
    assert read_runs(table) == runs


def test_the_committed_pages_state_the_committed_runs():
    runs = read_runs(HERE / "runs.csv")
    assert set(runs) == {cell.id for cell in CELLS}
    assert len({row["code_version"] for row in runs.values()}) == 1
    records = claim_records(runs)
    with (HERE / "claims.csv").open(newline="") as file:
        for record, row in zip(records, csv.DictReader(file), strict=True):
            assert [row["contrast"], row["verdict"]] == [record["contrast"], record["verdict"]]
            for key in ("effect", "low95", "high95", "p", "p_holm"):
                assert float(row[key]) == pytest.approx(record[key], rel=1e-4)
    page = (HERE / "README.md").read_text(encoding="utf-8")
    for table in (claims_table(records), arms_table(runs), ladder_table(runs)):
        assert table in page
    explored = by_seed(read_runs(HERE / "exploration.csv"), "scratch-qformer", "mean")
    ahead = [value - explored[seed] for seed, value in by_seed(runs, "scratch-avgpool", "mean").items()]
    low, high = seed_interval(ahead)
    assert f"{fmean(ahead):.1f} points ahead ({low:+.1f} to {high:+.1f})" in " ".join(page.split())
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    quoted = re.search(r"\| claim \|.*?\n\n", readme, flags=re.DOTALL)
    assert quoted
    numbers = re.findall(r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\) \**(holds|reversed|not resolved)", quoted[0])
    assert numbers == [
        (*(f"{one[key]:+.1f}" for key in ("effect", "low95", "high95")), one["verdict"]) for one in records
    ]
