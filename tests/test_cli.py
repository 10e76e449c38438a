import argparse
import importlib
import json
import shlex
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

import prism_deco
from prism_deco.cli import _parse, main
from prism_deco.commands import COMMANDS
from prism_deco.config import flat, load_config, save_config

ROOT = Path(__file__).parent.parent


def test_help_names_the_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    lines = {line.split("  ")[1]: line for line in shown.splitlines() if line.startswith("  ")}
    assert all(entry.summary in lines[name] for name, entry in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        main([*name.split(), "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    usage, description, *_ = shown.split("\n\n")
    assert usage.startswith(f"usage: prism-deco {name} ")
    example = shown.rpartition("example:\n  prism-deco ")[2]
    assert example.startswith(f"{name} ") or example.strip() == name
    # Every option that has a default says so.
    module = importlib.import_module(f"prism_deco.commands.{COMMANDS[name].module or name.split()[0]}")
    function = name.replace(" ", "_")
    command = getattr(module, function)
    assert description.split() == command.__doc__.split("\n\n")[0].split()
    parser = argparse.ArgumentParser()
    getattr(module, f"{function}_arguments")(parser)
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
            assert "default" in (action.help or ""), action.option_strings


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_understood(name):
    command, args = _parse(shlex.split(COMMANDS[name].example))
    assert command.__name__ == name.replace(" ", "_")
    for arguments in ("arguments", "names", "folders"):
        assert all(isinstance(value, str | Path) for value in getattr(args, arguments, []))


@pytest.mark.parametrize(
    ("arguments", "usage", "message"),
    [
        (["train", "seed=1", "--overwite"], "prism-deco train [-h]", "unrecognized arguments: --overwite"),
        (["data", "check", "--alow", "x"], "prism-deco data check [-h]", "unrecognized arguments: --alow"),
        (["bench", "train", "--steps", "many"], "prism-deco bench train [-h]", "--steps: 'many' is not a whole number"),
        (["bench", "train", "--batch-size", "0"], "prism-deco bench train [-h]", "argument --batch-size: '0' is not"),
        (["data", "check", "--workers", "0"], "prism-deco data check [-h]", "argument --workers: '0' is not a whole"),
        (["probe", "runs/x", "--limit", "0"], "prism-deco probe [-h]", "argument --limit: '0' is not a whole number"),
        (["sweep", "mini", "--jobs", "-1"], "prism-deco sweep [-h]", "argument --jobs: '-1' is not a whole number"),
        (["chat", "runs/x", "--max-new-tokens", "1.5"], "prism-deco chat [-h]", "'1.5' is not a whole number above 0"),
        (["export", "runs/x"], "prism-deco export [-h]", "the following arguments are required: --to"),
        (["trian"], "prism-deco COMMAND", "Unknown command 'trian'. Did you mean 'train'?"),
        (["data", "chek"], "prism-deco COMMAND", "Unknown command 'data chek'. Did you mean 'data check'?"),
        (["bench"], "prism-deco COMMAND", "Choices: bench data, bench gpu, bench projectors"),
        ([], "prism-deco COMMAND", "name a command"),
    ],
)
def test_wrong_flags_show_the_usage_of_their_command(arguments, usage, message, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: {usage}") and message in said


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"prism-deco {prism_deco.__version__}\n"
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"] and "version" in pyproject["project"]["dynamic"]
    assert pyproject["tool"]["hatch"]["version"]["path"] == "prism_deco/__init__.py"


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("asked", [["--help"], ["keys"], ["keys", "recipe.lora_dropout"]], ids=" ".join)
def test_lines_fit_the_terminal(asked, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    with suppress(SystemExit):
        main(asked)
    lines = capsys.readouterr().out.splitlines()
    assert lines and max(map(len, lines)) <= width


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_fits_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_keys_are_explained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["keys", "recipe"]) == 0
    shown = capsys.readouterr().out
    assert "  recipe.lr: a number, above 0 (default 2e-5)\n      Peak learning rate.\n" in shown
    assert "  recipe.resize: letterbox | pad | resize-naive | resize-crop (default letterbox)\n" in shown
    assert "  recipe.max_steps: a whole number, at least 1, or null (default null)\n" in shown
    assert "trainer.devices" not in shown
    assert main(["keys"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}: " in shown for key in ("trainer.devices", "evaluate.limit", "seed", "plugins"))
    assert main(["keys", "projector=qformer"]) == 0
    path, _, content = capsys.readouterr().out.partition("\n")
    assert content == Path(path.removeprefix("# ")).read_text() and "heads: 12" in content
    assert main(["keys", "recipe.lr"]) == 0
    assert capsys.readouterr().out == "  recipe.lr: a number, above 0 (default 2e-5)\n      Peak learning rate.\n"
    for group, choice in {"benchmark": "pope", "sweep": "generalization"}.items():
        assert main(["keys", group]) == 0
        assert f"{choice}," in capsys.readouterr().out.split()
        assert main(["keys", f"{group}={choice}"]) == 0
        assert f"{choice}.yaml" in capsys.readouterr().out.partition("\n")[0]
    assert main(["keys", "recipe.learning"]) == 2
    assert "Unknown key 'recipe.learning'." in capsys.readouterr().err
    assert main(["keys", "recipes"]) == 2
    assert "Unknown group 'recipes'. Did you mean 'recipe'?" in capsys.readouterr().err


def test_the_printed_configuration_says_where_values_come_from_and_can_be_given_back(capsys, tmp_path):
    arguments = ["projector=qformer", "recipe.lr=1e-4", "data=llava", "data.json=a #1.json", "run_id=007"]
    assert main(["train", "--print", *arguments]) == 0
    shown = capsys.readouterr().out
    lines = {line.split(":")[0].strip(): line for line in shown.splitlines()}
    assert lines["lr"].endswith("# command line") and "1e-4" in lines["lr"]
    assert lines["turn_mask"].endswith("# conf/recipe/mini.yaml")
    assert lines["resize"].endswith("letterbox                                           # default")
    assert lines["heads"].endswith("# conf/projector/qformer.yaml")
    (tmp_path / "mine.yaml").write_text(shown)
    assert flat(load_config([str(tmp_path / "mine.yaml")])) == flat(load_config(arguments))
    assert main(["train", "--print", "recipe=mini_two_stage", "align.recipe.lr=1"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("# stage")] == ["# stage align", "# stage finetune"]


def test_a_plan_takes_the_configuration_of_a_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    save_config(load_config(["run_id=x"]), tmp_path / "config.yaml")
    assert main(["plan", str(tmp_path / "config.yaml"), "recipe.max_steps=10"]) == 0
    assert main(["plan", "evaluate.benchmarks=mini_pope,mini_gqa"]) == 0
    assert "avgpool" in capsys.readouterr().out


def test_the_module_runs_as_the_script_does():
    done = subprocess.run([sys.executable, "-m", "prism_deco.cli", "train", "modle=1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("prism-deco: error: Unknown key modle.")
    assert "Traceback" not in done.stderr


def test_a_predictions_file_is_scored_without_a_model(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    rows = [
        {"question_id": f"{subset}/{i}", "image": "x.png", "prompt": "?", "output": output, "answer": None,
         "target": {"answer": label, "subset": subset, "variant": "generate"}, "score": 0.0}
        for subset in ("random", "popular", "adversarial")
        for i, (output, label) in enumerate([("Yes", "yes"), ("No.", "no"), ("yes", "no"), ("maybe", "yes")])
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "--score-only", str(path), "benchmark=mini_pope"]) == 0
    shown = capsys.readouterr().out
    assert "mini_pope" in shown and "75.0" in shown  # LLaVA's parser reads "maybe" as yes
    assert main(["evaluate", "--score-only", str(path)]) == 2
    assert "Name the benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "Name one run to score"),
        (["evaluate", "no/such/run", "benchmark=mini"], "is not a folder: give a run folder"),
        (["evaluate", "no/such/run", "another"], "Name one run to score"),
        (["bench", "projectors", "conv"], "Unknown projector 'conv'"),
        (["plan", "modle=1", "--json", "no/such/x.json"], "--json no/such/x.json: there is no folder no/such"),
        (["data", "check", "--out", __file__], "test_cli.py cannot be written (Not a directory)"),
        (["export", "runs/x", "--to", __file__], "test_cli.py cannot be written (Not a directory)"),
        (["report", "runs", "--out", f"{__file__}/x"], "test_cli.py/x cannot be written (Not a directory)"),
        (["report", "runs", "--out", "x" * 300], "xxx cannot be written (File name too long)"),
        (["sweep", "seed=1,2", f"runs_dir={__file__}"], "cannot be written (Not a directory)"),
        (["chat", "runs/x", "--relevance", "--out", __file__], "test_cli.py cannot be written (Not a directory)"),
        (["chat", "runs/x", "--image", __file__], "test_cli.py cannot be decoded as an image (its format is none of"),
        (["sweep", "seed=1,2", "--timeout", "-5"], "--timeout -5: give minutes"),
        (["sweep", "seed=1,2", "--timeout", "nan"], "--timeout nan: give minutes"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_options_may_stand_between_settings(capsys):
    assert main(["train", "seed=1", "--overwrite", "modle=1"]) == 2
    assert "Unknown key modle" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "seed=1", "--overwite", "seed=2"])
    assert "unrecognized arguments: --overwite" in capsys.readouterr().err


def test_lines_of_a_log_that_goes_to_a_file_are_whole():
    path = "/a/long/path" * 20
    code = (
        "import logging; from prism_deco.logs import configure_logging; configure_logging(debug=False); "
        f"logging.getLogger('prism_deco').warning('in %s [x]', {path!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith(f" WARNING in {path} [x]")


def test_brackets_of_the_user_are_no_markup(capsys, tmp_path):
    assert main(["plan", "data=llava", "data.json=bad/[/x]/[red]/a.json", f"data.image_root={tmp_path}"]) == 0
    assert "data.json=bad/[/x]/[red]/a.json: there is no such file" in " ".join(capsys.readouterr().out.split())
