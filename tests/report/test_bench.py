"""The page of a projector bench: runs scored with fewer tokens, costs, controls, and what parameters bring."""

import csv
import json
from statistics import fmean

import pytest

from prism_deco.report import figures, plotting
from prism_deco.report.assemble import write_report
from prism_deco.report.collect import collect
from prism_deco.report.grid import score_tables
from prism_deco.report.paired_tests import MEAN, paired_differences
from prism_deco.report.tables import worth_table

NAMES = ("gqa", "vqav2")
SKILLS = {"avgpool": 0.6, "resampler": 0.7, "every_kth": 0.4, "random_patches": 0.3, "small_image": 0.5}
ADDED = {"resampler": 50_000}


def _run(make, folder, projector, tokens, seed, skill, seconds, **options):
    trained = 700_000 + ADDED.get(projector, 0)
    name = "linear" if projector in ("linear", "small_image") else projector
    visual_in = tokens if projector == "small_image" else 64
    make.run(
        *(folder, f"projector={name}", f"seed={seed}", "evaluate.benchmarks=mini_gqa,mini_vqav2"),
        *(["evaluate.num_tokens=[4]"] if name == "matryoshka" else []),
        benchmarks=NAMES,
        skill=skill,
        params={"total": 1_000_000, "trained": trained},
        tokens={"visual_in": visual_in, "visual_out": tokens},
    )
    _tokens(folder / "eval", None, None, seconds)


def _tokens(folder, number, compressor, seconds, **options):
    content = {"num_tokens": number, "compressor": compressor, "options": options, "first_token_seconds": seconds}
    (folder / "tokens.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def bench(make, tmp_path_factory):
    """Two numbers of tokens, two seeds; `linear` once, compressed by FastV; a Matryoshka trained at 16."""
    folder = tmp_path_factory.mktemp("bench") / "sweep"
    cells = []
    for seed in (1, 2):
        for number, (projector, skill) in ((n, one) for n in (16, 4) for one in SKILLS.items()):
            name = f"{projector}-{number}-{seed}"
            cells.append({"id": name, "labels": {"projector": projector, "recipe.num_tokens": number, "seed": seed}})
            _run(make, folder / name, projector, number, seed, skill - 0.02 * (16 - number), number / 100)
        cells.append({"id": f"linear-{seed}", "labels": {"projector": "linear", "seed": seed}})
        linear = folder / f"linear-{seed}"
        _run(make, linear, "linear", 64, seed, 0.8, 0.5)
        matryoshka = folder / f"matryoshka-{seed}"
        labels = {"projector": "matryoshka", "recipe.num_tokens": 16, "seed": seed}
        cells.append({"id": matryoshka.name, "labels": labels})
        _run(make, matryoshka, "matryoshka", 16, seed, 0.55, 0.2)
        for name, number, skill in (("fastv", 16, 0.65), ("fastv", 4, 0.45), (None, 4, 0.5)):
            own = (linear if name else matryoshka) / "eval" / f"{name or 'tokens'}{number}"
            for benchmark in NAMES:
                make.scores(own / f"mini_{benchmark}", f"mini_{benchmark}", skill, seed)
            _tokens(own, number, name, 0.3, **({"layer": 1} if name else {}))
    make.ledger(folder, cells)
    (folder / "sweep.yaml").write_text("controls: [small_image, every_kth, random_patches]\n")
    return folder


def test_what_was_scored_with_fewer_tokens_stands_in_their_row(bench):
    [table] = score_tables(collect([bench]), "")
    assert not table.disagreements
    rows = {}
    for group in table.groups:
        rows.setdefault(group.row.rpartition("=")[2], {})[group.variant] = group
    same = [*SKILLS, "linear", "linear + fastv layer=1", "matryoshka"]
    assert {name: set(own) for name, own in rows.items()} == {"16": set(same), "4": set(same)}
    for number, own in rows.items():
        expected = dict.fromkeys(same, int(number)) | {"linear": 64}
        assert {variant: group.tokens for variant, group in own.items()} == expected
        assert own["linear"].first_token_ms == 500 and own["linear + fastv layer=1"].first_token_ms == 300
        fastv = own["linear + fastv layer=1"].scores("mini_gqa", "")["1"]
        content = json.loads((bench / f"linear-1/eval/fastv{number}/mini_gqa/metrics.json").read_text())
        assert fastv.value == content["metrics"]["accuracy"] != own["linear"].scores("mini_gqa", "")["1"].value


def test_what_parameters_bring_is_the_difference_to_average_pooling(bench):
    [table] = score_tables(collect([bench]), "")
    differences = paired_differences(table.groups, table.benchmarks, table.split, table.has_mean)
    found = worth_table(table, differences)
    lines = [[field.text for field in row] for row in found.rows]
    numbers = [k for k, line in enumerate(lines) if len(line) == 1]
    for start, end, number in ((numbers[0], numbers[1], 16), (numbers[1], len(lines), 4)):
        own = {line[0]: line[1:] for line in lines[start + 1 : end]}

        def mean(folder, number=number):
            return fmean(
                json.loads((bench / folder.format(seed) / f"mini_{name}/metrics.json").read_text())["metrics"][
                    "accuracy"
                ]
                for seed in (1, 2)
                for name in NAMES
            )

        base = mean(f"avgpool-{number}-{{}}/eval")
        for name, place in (
            ("resampler", f"resampler-{number}-{{}}/eval"),
            ("linear", "linear-{}/eval"),
            ("linear + fastv layer=1", f"linear-{{}}/eval/fastv{number}"),
        ):
            assert float(own[name][4]) == pytest.approx(mean(place) - base, abs=0.051)
            low, high = (float(bound) for bound in own[name][5].split(" to "))
            assert low < float(own[name][4]) < high
        assert own["resampler"][1] == "+50,000" and own["linear"][1] == "none"
        assert own["resampler"][3] == f"{10 * number:.1f}"
        gains = [float(values[4]) for values in own.values()]
        assert gains == sorted(gains, reverse=True)


def test_controls_are_bands_and_costs_have_axes_of_their_own(bench, monkeypatch):
    monkeypatch.setattr(figures, "to_svg", lambda figure: figure)
    [table] = score_tables(collect([bench]), "")
    for cost in figures.COSTS:
        [ax] = figures.mean_figure(table, cost).svg.axes
        drawn = [container.get_label() for container in ax.containers]
        assert len(drawn) == len(set(drawn)) and set(drawn).isdisjoint(SKILLS.keys() - {"avgpool", "resampler"})
        assert ax.get_xlabel() == cost.label
        bands = [patch.get_paths()[0].get_extents() for patch in ax.collections if patch.get_label() == "controls"]
        assert len(bands) == 2
        points = [point for point in figures.points(table, cost) if point.group.variant not in ("avgpool", "resampler")]
        for band, number in zip(bands, (4, 16), strict=True):
            own = [p.score.mean for p in points if p.group.variant in SKILLS and p.group.tokens == number]
            assert (band.y0, band.y1) == pytest.approx((min(own), max(own)))
    x = {container.get_label(): container.lines[0].get_xdata() for container in ax.containers}
    assert sorted(x["resampler"]) == [40, 160] and list(x["linear"]) == [500]  # the last cost: the first token


def test_sixty_projectors_look_different():
    looks = plotting.styles(f"p{k}" for k in range(58))
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 58


def test_long_rows_compare_with_average_pooling_only(make, tmp_path):
    for k in range(13):
        name = "avgpool" if k == 5 else f"p{k:02d}"
        make.run(tmp_path / "s" / name, "projector=avgpool", "evaluate.benchmarks=mini_gqa", benchmarks=("gqa",),
                 skill=0.3 + 0.02 * k, n=20)  # fmt: skip
    make.ledger(tmp_path / "s", [{"id": path.name, "labels": {"projector": path.name, "seed": 7}}
                                 for path in (tmp_path / "s").iterdir()])  # fmt: skip
    [table] = score_tables(collect([tmp_path / "s"]), "")
    pairs = paired_differences(table.groups, table.benchmarks, table.split)
    assert len(pairs) == 12 and {pair.first for pair in pairs} == {"avgpool"}
    assert MEAN not in {pair.benchmark for pair in pairs}


def test_the_page_has_them_all(bench, tmp_path):
    write_report([bench], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "24 models of" in text and "24 of 24 cells done" in text
    assert "fastv: the layers up to `layer` read all visual tokens" in text.replace("\\", "")
    assert "| every_kth *control* |" in text and "| avgpool |" in text
    for name in ("visual-tokens", "training", "first-token"):
        assert f"score-against-{name}.svg" in text
    assert "### Which projector is worth its parameters" in text
    cells = {row["cell"]: row for row in csv.DictReader((tmp_path / "cells.csv").read_text().splitlines())}
    assert cells["linear-1/fastv4"]["projector"] == "linear + fastv layer=1"
    assert (cells["linear-1/fastv4"]["visual_tokens"], cells["linear-1"]["visual_tokens"]) == ("4", "64")


def test_a_run_of_an_earlier_version_has_no_feature_cache(make, tmp_path):
    make.run(tmp_path / "run", "projector=avgpool", "evaluate.benchmarks=mini_gqa", benchmarks=("gqa",), skill=0.5)
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "  feature_cache: false\n" in text
    config.write_text(text.replace("  feature_cache: false\n", ""))
    write_report([tmp_path / "run"], tmp_path / "out")
    assert "cached before training" not in (tmp_path / "out/report.md").read_text()
    config.write_text(text.replace("feature_cache: false", "feature_cache: true"))
    write_report([tmp_path / "run"], tmp_path / "out")
    assert "cached before training" in (tmp_path / "out/report.md").read_text()
