"""Cells are told how many of them use the same features."""

import pytest

from prism_deco.config import load_config
from prism_deco.sweep import expand, parse
from prism_deco.sweep.features import runs_per_cache
from prism_deco.sweep.launchers import train_command
from prism_deco.sweep.ledger import Ledger


@pytest.fixture
def commands(tmp_path):
    def run(*arguments):
        spec = parse([*arguments, f"runs_dir={tmp_path}", "name=s"])
        cells = expand(spec)
        ledger = Ledger.merge(spec.folder, spec.name, cells)
        runs = runs_per_cache(cells)
        lines = {cell.id: train_command(spec.folder, ledger.entries[cell.id], runs) for cell in cells}
        return {name: load_config(line[line.index("train") + 1 :]).trainer for name, line in lines.items()}

    return run


def test_cells_that_share_are_counted(commands):
    found = commands("projector=avgpool,linear,qformer", "seed=7,8")
    runs = {name: settings.feature_cache_runs for name, settings in found.items()}
    assert len(runs) == 6 and set(runs.values()) == {2}
    assert {settings.feature_cache for settings in found.values()} == {"auto"}


def test_cells_without_a_cache_do_not_count(commands):
    found = commands("trainer.feature_cache=off,auto,on", "seed=7")
    assert [settings.feature_cache_runs for settings in found.values()] == [1, 2, 2]
