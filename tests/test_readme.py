"""The README's commands and examples are those that the tests run."""

import re
import shlex
from pathlib import Path

import pytest

from prism_deco.cli import main
from prism_deco.config import choices, load_config
from prism_deco.evaluation import resolve

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
    config = load_config(overrides)
    if config.evaluate.benchmarks:
        assert resolve(config.evaluate.benchmarks)


def test_other_commands_are_understood():
    for command in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([*shlex.split(command)[:1], "--help"])
        assert done.value.code == 0


def test_the_projector_example_is_the_tested_file():
    example = ROOT / "tests" / "projectors" / "example"
    assert (example / "token_merge.py").read_text() in TEXT
    assert (example / "token_merge.yaml").read_text() in TEXT


@pytest.mark.parametrize("group", ["backbone", "projector", "llm", "data", "recipe", "trainer", "benchmark"])
def test_the_table_of_choices_is_complete(group):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{group}` |"))
    listed = set(re.findall(r"`([a-z0-9_]+)`", row)) - {group}
    shipped = set(choices(group))
    assert listed <= shipped
    # The miniature benchmarks are listed by their pattern.
    assert shipped - listed <= {name for name in shipped if group == "benchmark" and name.startswith("mini_")}
