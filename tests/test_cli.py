import json
import subprocess
import sys

import pytest

from prism_deco.cli import main


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("train", "evaluate", "pretrain-mini", "bench"))


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
        (["evaluate"], "Name the one run to score"),
        (["evaluate", "no/such/run", "benchmark=mini"], "is not a folder: give a run folder"),
        (["evaluate", "no/such/run", "another"], "Name the one run to score"),
        (["pretrain-mini", "mini_clp", "--out", "x"], "Did you mean 'mini_clip'"),
        (["bench", "projectors", "conv"], "Unknown projector 'conv'"),
        (["plan", "modle=1", "--json", "no/such/x.json"], "--json no/such/x.json: there is no folder no/such"),
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


def test_the_parts_of_the_miniature_are_its_towers_and_tokenizers():
    from prism_deco.commands.miniature import MINIATURE_PARTS
    from prism_deco.miniature.pretraining import mini_towers

    assert {*mini_towers(), "tokenizers"} == set(MINIATURE_PARTS)


def test_lines_of_a_log_that_goes_to_a_file_are_whole():
    path = "/a/long/path" * 20
    code = f"from prism_deco import cli; cli._configure_logging(debug=False); cli.log.warning('in %s [x]', {path!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith(f" WARNING in {path} [x]")


def test_brackets_of_the_user_are_no_markup(capsys, tmp_path):
    assert main(["plan", "data=llava", "data.json=bad/[/x]/[red]/a.json", f"data.image_root={tmp_path}"]) == 0
    assert "data.json=bad/[/x]/[red]/a.json: there is no such file" in " ".join(capsys.readouterr().out.split())
