"""The README's commands and examples are those that the tests run."""

import re
import shlex
from pathlib import Path

import pytest

from prism_deco.cli import main
from prism_deco.config import choices
from prism_deco.evaluation import resolve
from prism_deco.stages import final_config
from prism_deco.sweep import parse
from prism_deco.sweep.expand import expand

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line.partition("prism-deco ")[2]
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if "prism-deco " in line
]


def test_the_first_two_blocks_install_and_run():
    shell = [block for kind, block in BLOCKS if kind == "bash"]
    assert shell[0].rstrip().endswith("pip install -e . && prism-deco train")
    assert shell[1].rstrip().endswith('pip install -e ".[test]" && pytest -n auto')


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("train")])
def test_training_commands_compose(command, monkeypatch):
    monkeypatch.chdir(ROOT / "tests" / "projectors" / "example")
    overrides = shlex.split(re.sub(r'"\$\(.*\)/data"', "photos", command))[1:]
    config = final_config([override for override in overrides if not override.startswith("-")])
    if config.evaluate.benchmarks:
        assert resolve(config.evaluate.benchmarks)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("sweep", "plan"))])
def test_sweeps_and_plans_compose(command):
    arguments = shlex.split(command.split(" --")[0])[1:]
    cells = expand(parse(arguments))
    assert len(cells) > 1
    for cell in cells:
        assert resolve(cell.config.evaluate.benchmarks)


def test_other_commands_are_understood():
    for command in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([*shlex.split(command)[:1], "--help"])
        assert done.value.code == 0


def test_the_projector_example_is_the_tested_file():
    example = ROOT / "tests" / "projectors" / "example"
    assert (example / "token_merge.py").read_text() in TEXT
    assert (example / "token_merge.yaml").read_text() in TEXT


@pytest.mark.parametrize("group", ["backbone", "projector", "llm", "data", "recipe", "trainer", "benchmark", "sweep"])
def test_the_table_of_choices_is_complete(group):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{group}` |"))
    listed = set(re.findall(r"`([a-z0-9_-]+)`", row)) - {group}
    shipped = set(choices(group))
    assert listed <= shipped
    # The miniature benchmarks are listed by their pattern.
    assert shipped - listed <= {name for name in shipped if group == "benchmark" and name.startswith("mini_")}
