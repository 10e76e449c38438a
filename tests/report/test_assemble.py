"""The whole report: its files, the same again for the same data, and the page in a real browser."""

import contextlib
import csv
import io
import json
import os
import pty
import re
import shutil
import statistics
import subprocess
import sys
import termios
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from prism_deco.cli import main
from prism_deco.report.assemble import write_report
from prism_deco.report.collect import collect
from prism_deco.report.grid import score_tables
from prism_deco.report.tables import scores_table
from prism_deco.report.tabular import TerminalTable

NASTY = '</style><script>document.title = "broken"</script><img src=x onerror="document.title = 1">'


@pytest.fixture(scope="module")
def report(mini_sweep, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    write_report([mini_sweep], out)
    return out


def test_the_files_of_a_report(report):
    figures = {"convergence"}
    names = {path.relative_to(report).as_posix() for path in report.rglob("*.*")}
    assert {"report.html", "report.md", "scores.csv", "differences.csv", "cells.csv"} <= names
    assert {f"figures/{name}.svg" for name in figures} <= names
    for path in report.glob("figures/*.svg"):
        ElementTree.parse(path)
    rows = list(csv.DictReader((report / "scores.csv").read_text().splitlines()))
    assert len(rows) == 4 * 8 and {row["planned_seeds"] for row in rows} == {"3"}
    assert len(list(csv.DictReader((report / "cells.csv").read_text().splitlines()))) == 12
    assert len(list(csv.DictReader((report / "differences.csv").read_text().splitlines()))) == 2 * 8
    runs = csv.DictReader((report / "run_scores.csv").read_text().splitlines())
    single = [r for r in runs if r["measure"] == "mini_gqa"]
    for row in (row for row in rows if row["benchmark"] == "mini_gqa"):
        own = [float(r["value"]) for r in single if (r["row"], r["projector"]) == (row["row"], row["projector"])]
        assert float(row["score"]) == pytest.approx(statistics.mean(own), rel=1e-5)
    text = (report / "report.md").read_text()
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    assert len(headings) == len(set(headings)) and "Cells" in headings
    assert (
        text.count("### Wins") == 1
        and "| M2-c_abstractor-8 | failed | 1 | ValueError: &lt;b&gt;bad&lt;/b&gt; |" in text
    )
    for name in re.findall(r"\]\(<(.*?)>\)", text):
        assert (report / name).is_file()


def test_the_same_data_give_the_same_files(make, tmp_path):
    for tokens in (4, 16):
        make.run(
            tmp_path / "s" / f"k{tokens}",
            f"recipe.num_tokens={tokens}",
            "evaluate.benchmarks=mini_gqa",
            benchmarks=("gqa",),
        )
    for out in ("one", "two"):
        write_report([tmp_path / "s"], tmp_path / out)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert {"tokens.svg", "score-against-visual-tokens.svg", "report.html"} <= {path.name for path in files}
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_the_page_is_one_file_and_all_text_is_escaped(make, tmp_path):
    make.run(tmp_path / "s/a", benchmarks=("gqa",))
    cells = [
        {"id": "a", "labels": {"row": NASTY, "projector": "avgpool", "seed": 7}, "log_tail": None},
        {"id": "b", "labels": {"row": NASTY}, "state": "failed", "reason": NASTY, "log_tail": NASTY},
    ]
    make.ledger(tmp_path / "s", cells)
    page, _ = write_report([tmp_path / "s"], mixed=True)
    assert page == tmp_path / "s/report/report.html"
    text = page.read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(|<script", text)
    assert "onerror" not in re.sub(r"&lt;.*?&gt;", "", text) and text.count("</style>") == 1
    assert "<script" not in (page.parent / "report.md").read_text().replace(
        "    " + NASTY, ""
    )  # an indented log is code


def test_an_empty_sweep_gives_a_page_that_says_so(make, tmp_path):
    make.ledger(tmp_path / "s", [])
    assert main(["report", str(tmp_path / "s")]) == 0
    assert "Nothing was planned or run here yet" in (tmp_path / "s/report/report.html").read_text()


def test_a_sweep_of_planned_cells_lists_them(make, tmp_path):
    make.ledger(tmp_path / "s", [{"id": "a", "labels": {"row": "M1"}, "overrides": ["seed=3"], "state": "planned"}])
    page, [table] = write_report([tmp_path / "s"])
    assert "0 of 1 cells done, 1 planned." in page.read_text()
    assert table.rows[1][2].text == "planned"


def test_other_splits_are_a_choice(make, tmp_path):
    make.run(tmp_path / "a", benchmarks=("gqa",))
    for folder in list((tmp_path / "a/eval").iterdir()):
        value = json.loads((folder / "metrics.json").read_text())
        shutil.copytree(folder, folder.with_name(f"{folder.name}-test"))
        value["metrics"]["accuracy"] = 12.5
        (folder.with_name(f"{folder.name}-test") / "metrics.json").write_text(json.dumps(value))
    page, [own] = write_report([tmp_path / "a"], tmp_path / "out")
    column = list(own.columns).index("mini_gqa")
    assert "Also scored: test (--split)." in page.read_text() and own.rows[1][column].text != "12.5"
    _, [test] = write_report([tmp_path / "a"], tmp_path / "out", split="test")
    assert test.rows[1][column].text == "12.5"
    with pytest.raises(ValueError, match="Scored splits: own, test"):
        write_report([tmp_path / "a"], tmp_path / "out", split="dev")


def _check_blocks(text, table, width):
    """Nothing of a table with short names is cut, broken or missing."""
    lines = text.splitlines()
    assert lines and max(map(len, lines)) <= width
    blocks = text.count("┡")
    for name in ("avgpool", "c_abstractor", "blind", "chance"):
        assert len(re.findall(rf"│ {name} ", text)) == 2 * blocks
    for word in (*table.columns[1:], *(field.text for row in table.rows for field in row)):
        assert word in text


@pytest.mark.parametrize("width", [60, 80, 160])
def test_tables_of_any_width_break_no_word_and_drop_nothing(mini_sweep, width):
    [found] = score_tables(collect([mini_sweep]), "")
    table = scores_table(found)
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(TerminalTable(table))
    _check_blocks(console.export_text(), table, width)


@pytest.mark.slow
def test_the_command_in_a_narrow_terminal(mini_sweep, tmp_path):
    """A pseudo-terminal of 60 columns."""
    command = [sys.executable, "-m", "prism_deco.cli", "report", str(mini_sweep), "--out", str(tmp_path)]
    first, second = pty.openpty()
    termios.tcsetwinsize(first, (24, 60))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdout=second, stderr=subprocess.PIPE, env=environment) as process:
        os.close(second)
        printed = b""
        with contextlib.suppress(OSError):  # its end, on Linux
            while part := os.read(first, 1 << 16):
                printed += part
        assert process.stderr is not None
        logged = process.stderr.read().decode()
    os.close(first)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.decode()).replace("\r", "")
    [found] = score_tables(collect([mini_sweep]), "")
    _check_blocks(text, scores_table(found), 60)
    for said in ("Reading the 12 cells of", "comparing 4 rows on 8 benchmarks", "Drawing the figures"):
        assert said in " ".join(logged.split())


def test_the_command_prints_scores_and_refuses_what_is_no_run(make, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "neither a run folder" in capsys.readouterr().err
    make.run(tmp_path / "a", "projector=c_abstractor", benchmarks=("gqa",))
    assert main(["report", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "c_abstractor" in printed and "Scores" in printed and (tmp_path / "report/report.html").is_file()


@pytest.mark.parametrize("width", [1280, 480])
def test_the_page_opens_in_a_browser_wide_and_narrow(browser, report, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get((report / "report.html").as_uri())
    assert browser.title == "mini" and not browser.get_log("browser")
    images = browser.execute_script("return Array.from(document.images, i => i.complete && i.naturalWidth)")
    assert images and all(size > 200 for size in images)
    # The page itself never scrolls sideways: wide tables and figures scroll by themselves.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    headings = [h.text for h in browser.find_elements("css selector", "h2")]
    assert headings == ["Unfinished cells", "Scores", "Cells"]
    assert "<b>bad</b>" in browser.find_element("css selector", "#section-1 table").text
    details = browser.find_element("css selector", "#section-1 details")
    details.find_element("css selector", "summary").click()
    assert "<two>" in details.find_element("css selector", "pre").text
