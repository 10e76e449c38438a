"""The ledger, what it says of outcomes, and what is shown of it."""

import io
import itertools
import json
import time

import pytest
from rich.console import Console
from rich.live import Live

from prism_deco.config import load_config
from prism_deco.errors import UsageError
from prism_deco.exits import PREEMPTED, SIGNALS
from prism_deco.sweep import Ledger, SweepCell, render, supervisor
from prism_deco.sweep.driver import Driver
from prism_deco.sweep.launchers import LocalLauncher
from prism_deco.sweep.live import duration, last_step, seconds_left
from prism_deco.sweep.outcome import Heartbeat, judge, stamp, tail

CONFIG = load_config(["recipe.max_steps=100"])


def _cells(labels: dict[str, list], *settings: str) -> list[SweepCell]:
    """Cells of axes, as `expand` makes them."""
    cells = []
    for values in itertools.product(*labels.values()):
        own = dict(zip(labels, values, strict=True))
        overrides = (*settings, *(f"{key}={value}" for key, value in own.items()))
        cells.append(SweepCell("-".join(f"{key}{value}" for key, value in own.items()), own, overrides, CONFIG))
    return cells


def _merge(folder, *settings, **labels):
    ledger = Ledger.merge(folder, "s", _cells(labels or {"seed": [7, 8]}, *settings))
    ledger.write()
    return ledger


def test_the_file_holds_what_readers_rely_on(tmp_path):
    ledger = _merge(tmp_path, "llm=mini_phi")
    ledger.update("seed8", state="failed", reason="why", log_tail="a\nb", attempts=1)
    content = json.loads((tmp_path / "ledger.json").read_text())
    assert content["name"] == "s"
    assert content["cells"][1] == {
        "id": "seed8", "labels": {"seed": 8}, "overrides": ["llm=mini_phi", "seed=8"], "state": "failed", "attempts": 1,
        "started": None, "seconds": 0.0, "reason": "why", "log_tail": "a\nb", "adjusted": [], "job": None,
    }  # fmt: skip
    assert Ledger.read(tmp_path).entries == ledger.entries


@pytest.mark.parametrize("text", ['{"name": "s", "cel', "[]", "{}", '{"name": "s", "cells": [{"id": "a"}]}', "\x00"])
def test_a_damaged_ledger_is_named_with_the_hint(tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(UsageError, match=r"ledger\.json is damaged .* move it away"):
        Ledger.read(tmp_path)


def test_without_its_ledger_a_sweep_knows_what_is_done(tmp_path):
    (tmp_path / "seed7").mkdir()
    (tmp_path / "seed7" / "status.json").write_text('{"state": "done"}')
    cells = _cells({"seed": [7]})
    ledger = Ledger.merge(tmp_path, "s", cells)
    Driver(ledger, cells, LocalLauncher(tmp_path, cells, command=_never), timeout=None).run()
    assert ledger.entries["seed7"].state == "done"


def _never(folder, entry):
    raise AssertionError("a cell that is done was started")


def test_cells_are_added_and_those_not_asked_for_stay(tmp_path):
    _merge(tmp_path).update("seed7", state="done")
    ledger = _merge(tmp_path, seed=[8, 9])
    assert {name: entry.state for name, entry in ledger.entries.items()} == {
        "seed7": "done", "seed8": "planned", "seed9": "planned",
    }  # fmt: skip


def test_a_cell_that_is_defined_differently_is_refused_by_the_keys(tmp_path):
    _merge(tmp_path, "recipe.lr=1e-3", "data.limit=10")
    message = (
        r"Cell seed7 .* data\.limit was 10 and is now not given; recipe\.lr was 1e-3 and is now 2e-3\. .*name=NAME"
    )
    with pytest.raises(ValueError, match=message):
        _merge(tmp_path, "recipe.lr=2e-3")
    with pytest.raises(ValueError, match=r"is a sweep over seed; this one is over seed, llm"):
        _merge(tmp_path, seed=[7], llm=["mini_phi", "mini_llama"])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="is a run folder"):
        _merge(tmp_path, "recipe.lr=1e-3", "data.limit=10")


def test_how_an_unfinished_cell_runs_may_change(tmp_path, caplog):
    ledger = _merge(tmp_path, "recipe.micro_batch_size=8")
    ledger.update("seed7", state="done")
    ledger.update("seed8", state="out_of_memory", adjusted=["recipe.micro_batch_size=4"])
    entries = _merge(tmp_path, "recipe.micro_batch_size=2", "trainer.threads=1").entries
    assert entries["seed8"].overrides == ["recipe.micro_batch_size=2", "trainer.threads=1", "seed=8"]
    assert entries["seed8"].adjusted == []
    assert entries["seed7"].overrides == ["recipe.micro_batch_size=8", "seed=7"]
    assert "seed7 is done: it keeps its recipe.micro_batch_size, trainer.threads" in caplog.text


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        (0, {"state": "done"}, ("done", None)),
        (0, {"state": "running"}, ("failed", "ended without an error, but status.json says running")),
        (75, {"state": "preempted"}, ("preempted", None)),
        (143, {"state": "running"}, ("preempted", None)),  # SIGTERM before it could save
        (138, {}, ("preempted", None)),  # SIGUSR1
        (76, {}, ("out_of_memory", None)),
        (1, {"state": "out_of_memory", "reason": "r"}, ("out_of_memory", "r")),
        (1, {"state": "failed", "reason": "r"}, ("failed", "r")),
        (137, {"state": "running"}, ("failed", "killed by SIGKILL (the machine's memory may have run out)")),
        (134, {}, ("failed", "killed by SIGABRT")),
        (2, {}, ("failed", "exit code 2: prism-deco: error: so")),
    ],
)
def test_outcomes(tmp_path, code, status, expected):
    (tmp_path / "log").write_text("...\nprism-deco: error: so\n")
    if status:
        (tmp_path / "status.json").write_text(json.dumps(status))
    outcome = judge(code, tmp_path, tmp_path / "log", before=0)
    assert (outcome.state, outcome.reason) == expected


def test_a_status_from_before_says_nothing_about_a_failure(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "out_of_memory"}')
    assert judge(1, tmp_path, tmp_path / "log", before=stamp(tmp_path)).state == "failed"
    (tmp_path / "status.json").write_text('{"state": "done"}')
    assert judge(0, tmp_path, tmp_path / "log", before=stamp(tmp_path)).state == "done"  # it was left alone


def test_the_tail_of_a_log_is_its_last_lines_and_a_bar_s_last_state(tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(f"line {i}\n" for i in range(5000)) + "\n 10%\r 50%\r 99%\r\nend\n", newline="")
    assert tail(path).splitlines() == [f"line {i}" for i in range(4982, 5000)] + [" 99%", "end"]
    assert tail(tmp_path / "none") == ""


def test_progress_is_read_from_the_last_whole_line(tmp_path):
    assert last_step(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 20, "loss": 0.1}\n{"val/loss": 2}\n{"ste')
    assert last_step(tmp_path) == 20


def test_a_heartbeat_is_output_or_a_changed_file_and_waiting_is_not_silence(tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    heart = Heartbeat(log, run)
    time.sleep(0.1)
    assert heart.silence() == 0  # still in the queue
    log.write_text("hello")
    assert heart.silence() == 0
    time.sleep(0.1)
    assert 0.1 <= heart.silence() < 1
    for place in (run / "tensorboard", tmp_path / "run-align"):  # a run's own file, and an earlier stage's
        place.mkdir(parents=True)
        (place / "events").write_text("x")
        assert heart.silence() == 0
        time.sleep(0.05)
        assert heart.silence() >= 0.05


def test_the_table_shows_states_progress_and_reasons(tmp_path):
    cells = {cell.id: cell for cell in _cells({"seed": [1, 2, 3, 4]})}
    ledger = _merge(tmp_path, seed=[1, 2, 3, 4])
    ledger.update("seed1", state="done", seconds=100.0, attempts=1)
    ledger.update("seed2", state="running", started=time.time() - 50, attempts=2)
    ledger.update("seed3", state="failed", seconds=4000.0, reason="exit code 1: [last] words")
    (tmp_path / "seed2").mkdir()
    (tmp_path / "seed2" / "metrics.jsonl").write_text('{"step": 25}\n')
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(ledger, cells))
    shown = console.export_text()
    for text in (
        "1 done, 1 running, 1 failed, 1 planned",
        "step 25/100",
        "1:06:40",
        "1:40",
        "exit code 1: [last] words",
    ):
        assert text in shown
    # seed1 took 100 s, so that seed2 takes 50 s more, and then seed4 100 s.
    left = seconds_left([ledger.entries[name] for name in cells])
    assert left == pytest.approx(150, abs=2)
    assert f"about {duration(left)[:2]}" in shown


def test_names_of_a_sweep_are_no_markup(tmp_path):
    (tmp_path / "ledger").mkdir()
    ledger = Ledger.merge(tmp_path / "ledger", "[/x] [red]y", _cells({"seed": [1]}))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(ledger))
    assert "[/x] [red]y: 1 planned" in console.export_text()


def test_on_a_terminal_the_table_follows_the_sweep(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("prism_deco.sweep.driver.POLL", 0.05)
    ledger, cells = _merge(tmp_path), _cells({"seed": [7, 8]})
    launcher = LocalLauncher(tmp_path, cells, gpus=[], command=lambda folder, entry: ["sleep", "0.3"])
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    with Live(console=console, auto_refresh=False) as live:
        Driver(ledger, cells, launcher, timeout=None, live=live).run()
    shown = console.file.getvalue()
    assert "1 running, 1 planned" in shown and "2 failed" in shown
    assert not caplog.records


def test_nothing_known_is_no_estimate(tmp_path):
    ledger = _merge(tmp_path)
    ledger.update("seed7", state="running", started=time.time())
    assert seconds_left(list(ledger.entries.values())) is None


def test_the_supervisor_which_imports_nothing_knows_the_exit_code():
    assert supervisor.PREEMPTED == PREEMPTED
    assert set(SIGNALS) < set(supervisor.STOP_SIGNALS)
