"""Sweeps of several parts, of which later ones choose settings by the results of earlier ones."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from fake_cell import __file__ as fake_cell

from prism_deco.sweep import Ledger, driver, dry_run, parse, run
from prism_deco.sweep.launchers import LocalLauncher

YAML = """
jobs: 2
parts:
  ladder:
    axes: {projector: [avgpool, maxpool], recipe.lr: [0.003, 0.006], seed: [0, 1]}
  compared:
    choose: {recipe.lr: ladder}
    rows:
      - {labels: {row: A}, settings: {projector: avgpool}}
      - {labels: {row: B}, settings: {projector: maxpool}}
    axes: {seed: [5, 6]}
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs the sweep above, or a variant, with fake cells; returns its success and its ledger."""
    monkeypatch.setattr(driver, "POLL", 0.05)
    path = tmp_path / "trial.yaml"

    def command(folder, entry):
        behaviour = "rung" if entry.id.startswith("ladder") else "well"
        return [sys.executable, "-S", fake_cell, behaviour, str(folder / entry.id), *entry.overrides]

    def launcher(spec, cells, jobs, *, dry=False):
        return LocalLauncher(spec.folder, cells, jobs=2, gpus=[], grace=5, command=command)

    monkeypatch.setattr(sys.modules["prism_deco.sweep.run"], "_launcher", launcher)

    def start(yaml: str = YAML, *arguments: str):
        path.write_text(yaml)
        spec = parse([str(path), f"runs_dir={tmp_path}", *arguments])
        done = run(spec, jobs=None, timeout=None, console=Console(file=io.StringIO()))
        return done, Ledger.read(spec.folder), spec

    return start


def _overrides(ledger: Ledger, part: str) -> dict[str, list[str]]:
    return {name: entry.overrides for name, entry in ledger.entries.items() if entry.labels["part"] == part}


def test_later_cells_run_at_the_value_with_the_lowest_mean_loss(sweep):
    done, ledger, _ = sweep()
    assert not done  # a rung diverged
    states = {name: entry.state for name, entry in ledger.entries.items() if entry.state != "done"}
    assert states == {f"ladder-maxpool-lr0.006-seed{seed}": "failed" for seed in (0, 1)}
    # avgpool: (1.0 + 3.9) / 2 is less than (2.0 + 3.0) / 2; maxpool has one rung left.
    assert _overrides(ledger, "compared") == {
        "compared-A-seed5": ["projector=avgpool", "seed=5", "recipe.lr=0.006"],
        "compared-A-seed6": ["projector=avgpool", "seed=6", "recipe.lr=0.006"],
        "compared-B-seed5": ["projector=maxpool", "seed=5", "recipe.lr=0.003"],
        "compared-B-seed6": ["projector=maxpool", "seed=6", "recipe.lr=0.003"],
    }


def test_a_choice_stays_and_is_not_made_again(sweep):
    _, before, spec = sweep()
    # Were the ladder asked again, its other rung would win now.
    for seed in (0, 1):
        (spec.folder / f"ladder-avgpool-lr0.003-seed{seed}/metrics.jsonl").write_text('{"step": 2, "val/loss": 0.0}\n')
    _, after, _ = sweep()
    assert _overrides(after, "compared") == _overrides(before, "compared")
    assert after.entries["compared-A-seed5"].attempts == 1


def test_what_waits_says_so_and_parts_can_be_run_alone(sweep, tmp_path):
    done, ledger, _ = sweep(YAML, "part=ladder", "projector=avgpool")
    assert done and list(ledger.entries) == [
        "ladder-avgpool-lr0.003-seed0", "ladder-avgpool-lr0.003-seed1",
        "ladder-avgpool-lr0.006-seed0", "ladder-avgpool-lr0.006-seed1",
    ]  # fmt: skip
    text = dry_run(parse([str(tmp_path / "trial.yaml"), f"runs_dir={tmp_path}"]), jobs=None)
    assert "# compared-A-seed5, planned\n" in text
    assert "# compared-B-seed5, planned, recipe.lr is chosen by the results of ladder\n" in text


def test_without_a_result_there_is_no_choice(sweep):
    yaml = YAML.replace("lr: [0.003, 0.006]", "lr: [0.006]").replace("[avgpool, maxpool]", "[maxpool]")
    yaml = yaml.replace("- {labels: {row: A}, settings: {projector: avgpool}}", "")
    with pytest.raises(ValueError, match=r"cannot choose recipe\.lr: none of ladder-maxpool-lr0.006-seed0"):
        sweep(yaml)


def test_a_ladder_without_the_choosing_projector_is_an_error(sweep):
    yaml = YAML.replace("[avgpool, maxpool]", "[avgpool, linear]")
    with pytest.raises(ValueError, match=r"compared-B-seed5 .* no cell of the same projector"):
        sweep(yaml)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{recipe.lr: ladder}",
            "{recipe.lr: compared}",
            "chooses recipe.lr from compared, which is not an earlier part",
        ),
        ("    choose:", "    chose:", "Unknown key of the part compared .*chose"),
        ("jobs: 2", "axes: {seed: [1]}", "has parts: move its rows and axes into them"),
    ],
)
def test_mistakes_in_parts_are_errors(tmp_path, old, new, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(ValueError, match=message):
        parse([str(path)])
