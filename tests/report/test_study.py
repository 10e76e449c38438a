"""The report of a sweep with parts, and of its claims: the files, what they say, and the page in a real browser."""

import csv
import io
import json
import math
import statistics
from datetime import UTC, datetime

import forest_plot
import numpy as np
import pytest
import report_claims
from claims import Claim, Contrast, parse_claims
from contrasts import Study, contrast_records
from forest_plot import forests
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import OmegaConf
from part_settings import search_records
from PIL import Image
from scipy import stats

from prism_deco.report.assemble import write_report
from prism_deco.report.collect import collect
from prism_deco.sweep.expand import expand
from prism_deco.sweep.spec import parse

NASTY = '</style><script>document.title = "broken"</script>'
RATES = (0.0015, 0.003, 0.006)
SKILL = {"avgpool": 0.7, "linear": 0.6, "blind": 0.3, "fewer": 0.5}
LOSSES = {"avgpool": (0.9, 0.5, 0.7), "linear": (0.8, 0.7, 0.6), "blind": (1.0, None, float("nan"))}
STEPS, TOKENS = {"part": "steps", "projector": "avgpool"}, {"part": "tokens", "recipe.num_tokens": 9}
LINEAR = {"part": "steps", "projector": "linear"}
SWEEP = {
    "parts": {
        "ladder": {"axes": {"recipe.lr": list(RATES)}},
        **{part: {"choose": {"recipe.lr": "ladder"}} for part in ("steps", "tokens", "compute")},
    },
    "claims": [
        {
            "name": "pooling",
            "paper": NASTY,
            "contrasts": [
                {"first": STEPS, "second": LINEAR, "measures": ["mean", "boxes"]},
                {"first": STEPS, "second": LINEAR | {"part": "compute"}, "equal": "compute"},
            ],
        },
        {"name": "upper bound", "contrasts": [{"first": LINEAR, "second": STEPS}]},
        {"name": "tokens", "contrasts": [{"first": STEPS, "second": TOKENS, "expect": "not_less", "margin": 2.5}]},
        {"name": "absent", "contrasts": [{"first": STEPS, "second": {"projector": "qformer"}}]},
    ],
}


def _overrides(name):
    return {"blind": ["recipe.blind=true"], "linear": ["projector=linear"], "fewer": ["recipe.num_tokens=9"]}.get(
        name, []
    )


def _labels(name):
    extra = {"blind": {"recipe.blind": True}, "fewer": {"recipe.num_tokens": 9}}.get(name, {})
    return {"projector": "linear" if name == "linear" else "avgpool", **extra}


@pytest.fixture(scope="module")
def study(make, tmp_path_factory):
    """The folder, and the mean score by part, name and seed; the linear model of seed 3 failed."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    cells, means = [], {}

    def add(part, name, id, labels, overrides, **more):
        cells.append({"id": id, "labels": {"part": part, **_labels(name), **labels}})
        cells[-1]["overrides"] = [*_overrides(name), *overrides]
        return make.run(folder / id, *cells[-1]["overrides"], skill=SKILL[name], n=40, **more)

    for name, losses in LOSSES.items():
        for rate, loss in zip(RATES, losses, strict=True):
            id = f"ladder-{name}-{rate}"
            settings = [f"recipe.lr={rate}", "evaluate.benchmarks=null"]
            add("ladder", name, id, {"recipe.lr": rate}, settings, benchmarks=())
            lines = [{"step": 50, "val/loss": 0.1}, *([{"step": 100, "val/loss": loss}] if loss is not None else [])]
            (folder / id / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[-1:]))
            if loss is None:
                (folder / id / "metrics.jsonl").write_text("")
    runs = [("steps", name, seed) for name in ("avgpool", "linear", "blind") for seed in (1, 2, 3)]
    runs += [(part, name, seed) for part, name in (("tokens", "fewer"), ("compute", "linear")) for seed in (1, 2, 3)]
    for part, name, seed in runs:
        id = f"{part}-{name}-{seed}"
        # What the avgpool's 1050 steps cost pays for 714 of the linear model.
        steps, samples = (714, 11_424) if part == "compute" else (1050, 16_793)
        failed = id == "steps-linear-3"
        settings = [f"seed={seed}", f"recipe.lr={0.006 if name == 'linear' else 0.003}"]
        settings.append("evaluate.benchmarks='mini_refcoco,mini_gqa'")
        more = {"benchmarks": ("refcoco", "gqa"), "steps": steps, "samples": samples}
        scores = add(part, name, id, {"seed": seed}, settings, state="failed" if failed else "done", **more)
        if seed > 1:
            (folder / id / "metrics.jsonl").unlink()  # drawing curves takes its time
        if failed:
            cells[-1] |= {"state": "failed", "reason": "killed"}
        else:
            means[part, name, seed] = statistics.mean(scores.values())
    make.ledger(folder, cells)
    OmegaConf.save(OmegaConf.create(SWEEP), folder / "sweep.yaml")
    return folder, means


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    _, tables = write_report([study[0]], out)
    report_claims.report_claims(study[0], out)
    return out, tables


def _read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_claims_csv_holds_what_was_planted(study, report):
    means = study[1]
    first, boxes, compute, bound, fewer, absent = _read(report[0] / "claims.csv")
    # Two seeds in common: the third of linear failed.
    ours, theirs = ([means["steps", name, seed] for seed in (1, 2)] for name in ("avgpool", "linear"))
    test = stats.ttest_rel(ours, theirs)
    assert float(first["effect"]) == pytest.approx(statistics.mean(ours) - statistics.mean(theirs), rel=1e-5)
    low, high = test.confidence_interval(0.95)
    assert (float(first["low95"]), float(first["high95"])) == pytest.approx((low, high), rel=1e-4)
    assert float(first["p"]) == pytest.approx(test.pvalue, rel=1e-4)
    assert (first["seeds"], first["planned_seeds"], first["first_seeds"]) == ("1 2", "3", "3")
    assert first["notes"].startswith("part=steps projector=linear: seed 3 failed")
    blind = statistics.mean(means["steps", "blind", seed] for seed in (1, 2, 3))
    assert float(first["blind_mean"]) == pytest.approx(blind, rel=1e-5)
    assert (boxes["judged"], compute["equal"], compute["verdict"]) == ("False", "compute", "holds")
    gaps = [means["steps", "avgpool", seed] - means["tokens", "fewer", seed] for seed in (1, 2, 3)]
    assert float(fewer["effect"]) == pytest.approx(statistics.mean(gaps), rel=1e-5)
    assert (fewer["margin"], fewer["verdict"]) == ("2.5", "holds")
    assert float(bound["effect"]) == -float(first["effect"])
    assert absent["verdict"] == "not resolved" and absent["notes"] == "no cell has the labels projector=qformer"
    # Five tests: the claim about cells that are not there has none.
    smallest = min(float(row["p"]) for row in (first, boxes, compute, bound, fewer))
    assert min(float(row["p_holm"]) for row in (first, boxes, compute, bound, fewer)) == pytest.approx(
        5 * smallest, rel=1e-4
    )


def test_the_search_says_what_was_chosen_and_where_its_edge_is(study, report):
    records = search_records(SWEEP, collect([study[0]]))
    assert {(one["projector"], one["value"], one["at_edge"], one["used"]) for one in records if one["chosen"]} == {
        ("avgpool", "0.003", False, "0.003"),
        ("linear", "0.006", True, "0.006"),
        ("avgpool (blind)", "0.0015", True, "0.003"),
    }
    tried = {(one["projector"], one["value"]): (one["val_loss"], one["missing"]) for one in records}
    assert tried["avgpool", "0.003"] == (0.5, None) and tried["avgpool (blind)", "0.003"] == (None, "no val/loss")
    assert math.isnan(tried["avgpool (blind)", "0.006"][0])
    written = _read(report[0] / "ladder.csv")
    assert [row["value"] for row in written if row["chosen"] == "True"] == ["0.006", "0.003", "0.0015"]


def test_what_each_entry_cost(report):
    rows = {(row["part"], row["projector"], row["visual_tokens"]): row for row in _read(report[0] / "compute.csv")}
    budget, paid = rows["steps", "avgpool", "16"], rows["compute", "linear", "64"]
    assert (budget["steps"], paid["steps"]) == ("1050", "714")
    assert float(paid["tflop"]) == pytest.approx(float(budget["tflop"]), rel=0.01)
    assert float(paid["gflop_per_step"]) * 714 == pytest.approx(1000 * float(paid["tflop"]), rel=1e-4)
    assert float(rows["steps", "linear", "64"]["tflop"]) > 1.4 * float(budget["tflop"])


def test_parts_have_tables_of_their_own_with_the_blind_model(study, report):
    assert [table.title for table in report[1]] == ["Scores: steps", "Scores: tokens", "Scores: compute"]
    for table in report[1]:
        assert "blind" in [row[0].text for row in table.rows]
    assert {row["part"] for row in _read(report[0] / "scores.csv")} == {"steps", "tokens", "compute"}


def test_the_claims_page_says_what_became_of_each(report):
    text = (report[0] / "claims.md").read_text()
    table = text.partition("## Claims")[2].partition("## Contrasts")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    verdicts = {name.partition(" *")[0]: [one.partition(" *")[0] for one in fields] for name, *fields in rows}
    assert verdicts == {
        "claim": ["equal steps", "equal compute"],
        "pooling": ["**holds**", "**holds**"],
        "upper bound": ["**reversed**", "-"],
        "tokens": ["**holds**", "-"],
        "absent": ["not resolved", "-"],
    }
    for name in ("claims.md", "claims.html"):
        assert "<script" not in (report[0] / name).read_text()
    assert "if the same study were repeated with these learning rates and these questions, and nothing about" in text
    assert "](<figures/claims-points.svg>)" in text and (report[0] / "figures/claims-points.svg").is_file()


def test_a_report_says_where_claims_are_tested(study, make, tmp_path, caplog):
    caplog.set_level("INFO")
    make.ledger(tmp_path / "s", [])
    write_report([tmp_path / "s"])
    assert "report_claims.py" not in caplog.text
    OmegaConf.save(OmegaConf.create({"claims": SWEEP["claims"]}), tmp_path / "s/sweep.yaml")
    write_report([tmp_path / "s"])
    assert f"runs/reference/study/report_claims.py {tmp_path / 's'}" in caplog.text


def test_the_report_begins_with_models_date_and_version(study, make, tmp_path):
    first, second, *_ = (report_lines := _first_lines(study[0], tmp_path / "a"))
    assert first == "# study" and second.startswith(
        "23 models of 1,000,000 parameters (vision backbone mini_siglip, LLM"
    )
    assert "trained with prism_deco 0.1.0 for 200 to 1,050 steps on 3,200 to 16,793 records of shapes" in second
    assert report_lines[2].startswith("23 of 24 cells done, 1 failed.")
    days = {"a": datetime(2026, 3, 5, 23, 59, tzinfo=UTC), "b": datetime(2026, 3, 7, tzinfo=UTC)}
    for name, day in days.items():
        make.run(tmp_path / "runs" / name, f"projector={'avgpool' if name == 'a' else 'linear'}", benchmarks=("gqa",))
        status = {"state": "done", "seconds": 1.0, "started": day.timestamp()}
        (tmp_path / "runs" / name / "status.json").write_text(json.dumps(status))
    assert "trained between 2026-03-05 and 2026-03-07 with" in _first_lines(tmp_path / "runs", tmp_path / "b")[1]
    assert "trained on 2026-03-05 with" in _first_lines(tmp_path / "runs/a", tmp_path / "c")[1]


def _first_lines(folder, out):
    write_report([folder], out)
    return [line for line in (out / "report.md").read_text().splitlines() if line]


def test_steps_must_agree_within_a_part(study, tmp_path, make):
    make.run(tmp_path / "s/a", "seed=1", benchmarks=("gqa",), steps=100)
    make.run(tmp_path / "s/b", "seed=1", "projector=linear", benchmarks=("gqa",), steps=200)
    labels = {name: {"part": part, "seed": 1} for name, part in (("a", "x"), ("b", "y"))}
    make.ledger(tmp_path / "s", [{"id": name, "labels": its} for name, its in labels.items()])
    write_report([tmp_path / "s"])
    make.ledger(tmp_path / "s", [{"id": name, "labels": labels["a"]} for name in labels])
    with pytest.raises(ValueError, match="Scores: x saw different things.*steps: 200 in b; 100 in a"):
        write_report([tmp_path / "s"])


@pytest.mark.parametrize(
    ("content", "message"), [({"claims": [{"name": "n", "contrast": []}]}, "contrast"), ({}, "states no claims")]
)
def test_a_wrong_claim_is_an_error_of_the_user(tmp_path, make, monkeypatch, capsys, content, message):
    make.ledger(tmp_path / "s", [])
    OmegaConf.save(OmegaConf.create(content), tmp_path / "s/sweep.yaml")
    monkeypatch.setattr("sys.argv", ["report_claims.py", str(tmp_path / "s")])
    assert report_claims.main() == 2
    assert message in capsys.readouterr().err


def test_no_text_of_the_forest_plot_lies_on_another(study, monkeypatch):
    drawn = []
    monkeypatch.setattr(forest_plot, "to_svg", lambda figure: drawn.append(figure) or b"")
    cells = collect([study[0]])
    long = {"part": "tokens", "recipe.num_tokens": "9"}
    text = {key: str(value) for key, value in STEPS.items()}
    contrasts = [
        Contrast(text, long, ["mean", "boxes"], "not_less", 2.5),
        Contrast(long, text),
        Contrast(text, {"a": "b"}),
    ]
    claims = [Claim(f"A claim with a name that takes some room, number {k}", contrasts) for k in range(3)]
    [figure] = forests(contrast_records(claims, Study(cells, ["mini_refcoco", "mini_gqa"], "")))
    assert figure.name == "claims-points"
    [canvas] = drawn
    FigureCanvasAgg(canvas).draw()
    plot, numbers = canvas.axes
    renderer = FigureCanvasAgg(canvas).get_renderer()
    [table] = numbers.tables
    texts = [cell.get_text() for cell in table.get_celld().values() if cell.get_text().get_text()]
    assert len(texts) == 8 + 3 * 4 * 8  # heads, and a row for each of three claims' four contrasts
    texts += plot.get_yticklabels()
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert not [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]
    assert not [box for box in boxes if box.overlaps(plot.get_window_extent(renderer))]
    assert all(box.x0 >= 0 and box.x1 <= canvas.bbox.x1 and box.y1 <= canvas.bbox.y1 for box in boxes)
    # A contrast's numbers stand beside its mark.
    for y, label in enumerate(plot.get_yticklabels()):
        row = table[y + 1, 0].get_window_extent(renderer)
        centre = label.get_window_extent(renderer)
        assert (centre.y0 + centre.y1) / 2 == pytest.approx((row.y0 + row.y1) / 2, abs=2)


def test_marks_are_coloured_by_verdict_and_filled_hollow_or_go_on(study, monkeypatch):
    drawn = []
    monkeypatch.setattr(forest_plot, "to_svg", lambda figure: drawn.append(figure) or b"")
    cells = collect([study[0]])
    avgpool, linear = ({key: str(value) for key, value in arm.items()} for arm in (STEPS, LINEAR))
    contrasts = [
        Contrast(avgpool, linear),
        Contrast(avgpool, linear | {"part": "compute"}, equal="compute"),
        Contrast(linear, avgpool),
        Contrast(avgpool, avgpool),
    ]
    results = contrast_records([Claim("one", contrasts)], Study(cells, ["mini_refcoco", "mini_gqa"], ""))
    assert [result["verdict"] for result in results] == ["holds", "holds", "reversed", "not resolved"]
    forests(results)
    ax = drawn[0].axes[0]
    marks = [container.lines[0] for container in ax.containers]
    colors = [mark.get_color() for mark in marks]
    assert colors[0] == colors[1] and len(set(colors)) == 3
    assert [mark.get_markerfacecolor() for mark in marks[:2]] == [colors[0], "#ffffff"]
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx([result["effect"] for result in results])
    # Two seeds have an interval longer than the axis, which is as long as those of three and the effects need.
    assert "<" in [line.get_marker() for line in ax.lines]


def test_the_claims_of_the_study_are_about_its_cells():
    spec = parse(["study", "seed=1"])
    claims, cells = parse_claims(spec.claims), expand(spec)
    assert len(claims) == 7 and {grid.name for grid in spec.grids} == {"ladder", "steps", "tokens", "compute"}
    known = [
        {"projector": cell.config.projector.name} | {key: str(value) for key, value in cell.labels.items()}
        for cell in cells
    ]
    for contrast in (contrast for claim in claims for contrast in claim.contrasts):
        for side in (contrast.first, contrast.second):
            [found] = [labels for labels in known if side.items() <= labels.items() and "recipe.blind" not in labels]
            assert found["part"] != "ladder"


@pytest.fixture(params=[(width, mode) for width in (400, 1400) for mode in ("light", "dark")], ids=str)
def page(browser, report, request):
    """The page of claims as a phone or a screen shows it, by day and by night: the browser, its width, the mode."""
    width, mode = request.param
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((report[0] / "claims.html").as_uri())
    yield browser, width, mode
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _pixels(element):
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("L"), dtype=float)


def test_the_page_of_a_study_in_a_browser(page):
    browser, width, mode = page
    assert browser.title == "The claims of study" and not browser.get_log("browser")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    headings = [h.text for h in browser.find_elements("css selector", "h2")]
    assert headings == ["Claims", "Contrasts", "Settings chosen on the validation split", "Steps and compute"]
    assert [link.text for link in browser.find_elements("css selector", "nav a")] == headings
    claims = browser.find_element("css selector", "#section-1")
    assert NASTY in claims.text
    # Verdicts are in sight.
    words = browser.find_elements("css selector", "#section-1 td + td, #section-2 td:nth-of-type(2):not(:empty)")
    assert {word.text.split("\n")[0] for word in words} == {"holds", "reversed", "not resolved", "-"}
    for word in words:
        assert word.rect["x"] >= 0 and word.rect["x"] + min(word.rect["width"], 60) <= width
    # Figures are as bright as the page.
    images = browser.find_elements("css selector", "img")
    assert browser.execute_script("return Array.from(document.images).every(i => i.complete && i.naturalWidth > 200)")
    assert (_pixels(images[0]).mean() > 200) == (mode == "light") and (_pixels(images[0]).mean() < 80) == (
        mode == "dark"
    )
    framed = _pixels(images[0])
    assert abs(np.median(framed[4, 20:-20]) - np.median(framed)) < 20, "the frame is as bright as the figure"


BROKEN = """
const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (!node.parentElement.closest('table')) continue;
  for (const found of node.data.matchAll(/[\\w.]+|[-+\\d.]+\\sto\\s[-+\\d.]+/g)) {
    const range = document.createRange();
    range.setStart(node, found.index);
    range.setEnd(node, found.index + found[0].length);
    if (new Set(Array.from(range.getClientRects(), box => box.top)).size > 1) broken.push(found[0]);
  }
}
return broken;
"""


def test_no_word_and_no_interval_of_a_table_is_broken(page):
    browser, _, _ = page
    notes = [note.text for note in browser.find_elements("css selector", "#section-1 td em")]
    assert any("\u00a0to\u00a0" in note or " to " in note for note in notes)
    assert browser.execute_script(BROKEN) == []


def test_wide_tables_show_that_they_scroll_and_keep_their_first_column(page):
    browser, width, _ = page
    region = browser.find_element("css selector", "#section-2 .scroll")
    name = region.find_element("css selector", "tbody tr:nth-child(2) td")
    scrolls = browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", region)
    assert scrolls == (width == 400)
    place = name.rect["x"]
    edge = _pixels(region)[:, -12:-2]
    browser.execute_script("arguments[0].scrollLeft = 10000", region)
    assert name.rect["x"] == place
    if scrolls:
        # A shade at the right, as long as there is something there.
        ground = np.median(_pixels(region)[:, -12:-2])
        assert abs(np.median(edge) - ground) > 15
