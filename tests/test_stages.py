"""One command line, several runs: which, in which order, and what becomes of signals and exit codes."""

import os
import signal
import subprocess
import sys

import pytest

from prism_deco import stages
from prism_deco.config import GROUPS, choices, load_choice
from prism_deco.stages import final_config, run, split


def test_a_recipe_without_stages_has_none():
    assert split([]) == [] and split(["recipe=prism", "seed=3"]) == []
    assert final_config(["recipe=prism", "seed=3"]).seed == 3


def test_settings_reach_their_stages():
    align, finetune = split(
        ["seed=3", "recipe=llava_v1_5", "align.recipe.max_steps=10", "finetune.data.root=/b", "data.num_workers=1",
         "runs_dir=out", "run_id=x", "evaluate.benchmarks=pope"]
    )  # fmt: skip
    assert (align.name, finetune.name) == ("align", "finetune")
    assert [str(s.folder) for s in (align, finetune)] == ["out/x-align", "out/x"]
    assert (align.config.recipe.max_steps, finetune.config.recipe.max_steps) == (10, None)
    assert (align.config.data.root, finetune.config.data.root) == (None, "/b")
    for stage in (align, finetune):
        assert (stage.config.seed, stage.config.data.num_workers) == (3, 1)
    assert (align.config.recipe.start_from, finetune.config.recipe.start_from) == (None, "out/x-align")
    assert (align.config.evaluate.benchmarks, finetune.config.evaluate.benchmarks) == (None, "pope")
    assert final_config(["recipe=llava_v1_5", "finetune.recipe.lr=1e-5"]).recipe.lr == 1e-5


def test_only_the_last_stage_is_scored():
    *before, last = split(["recipe=mini_two_stage", "evaluate.relevance=mini_refcoco"])
    asked = [(stage.config.evaluate.benchmarks, stage.config.evaluate.relevance) for stage in (*before, last)]
    assert asked == [(None, None), ("mini", "mini_refcoco")]


def test_a_setting_for_one_stage_wins_over_one_for_all_and_over_its_own():
    align, finetune = split(["recipe=llava_v1_5", "recipe.lr=1", "align.recipe.lr=2", "data=shapes"])
    assert (align.config.recipe.lr, finetune.config.recipe.lr) == (2, 1)
    assert (align.config.data.name, finetune.config.data.name) == ("shapes", "shapes")
    _, finetune = split(["recipe=llava_v1_5", "finetune.recipe.start_from=null", "finetune.data=shapes"])
    assert finetune.config.recipe.start_from is None and finetune.config.data.name == "shapes"


def test_the_run_is_named_by_its_choices_and_the_whole_recipe():
    align, finetune = split(["recipe=mini_two_stage", "seed=2"])
    name = "mini_siglip-avgpool-mini_qwen2-shapes-mini_two_stage-s2"
    assert [s.folder.name for s in (align, finetune)] == [f"{name}-align", name]
    assert finetune.config.recipe.start_from == f"runs/{name}-align"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("align.recipe.learn=1", "Stage align: Unknown key recipe.learn"),
        ("algin.recipe.lr=1", "Unknown key algin"),
        ("recipe=llava", "Unknown recipe 'llava'.*Did you mean 'llava_v1_5'"),
    ],
)
def test_mistakes_are_found_before_anything_starts(argument, message):
    with pytest.raises(ValueError, match=message):
        split(["recipe=llava_v1_5", argument])


def test_no_stage_has_the_name_of_a_group():
    for choice in choices("recipe"):
        assert not set(load_choice("recipe", choice).get("stages") or {}) & {*GROUPS, "evaluate"}


def test_a_recipe_of_stages_is_no_single_run():
    from prism_deco.build import build_model
    from prism_deco.config import load_config

    with pytest.raises(ValueError, match="recipe=llava_v1_5 is made of stages.*align: recipe=llava_v1_5_align"):
        build_model(load_config(["recipe=llava_v1_5"]), device="meta")


LINE = ["recipe=mini_two_stage", "run_id=x"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Replaces `prism-deco train` by a script; gives what it was called with."""
    calls = tmp_path / "calls"

    def install(body: str) -> list[str]:
        script = tmp_path / "fake.py"
        script.write_text(f"import os, sys, signal\nopen({str(calls)!r}, 'a').write(sys.argv[1] + '\\n')\n{body}\n")
        popen = subprocess.Popen

        def start(command, **options):
            assert command[:4] == [sys.executable, "-m", "prism_deco.cli", "train"]
            name = "check" if "--check" in command else next(a for a in command if a.startswith("run_id="))
            return popen([sys.executable, str(script), name, *command[4:]], **options)

        monkeypatch.setattr(stages.subprocess, "Popen", start)
        return LINE

    install.calls = lambda: calls.read_text().split()
    return install


def test_stages_run_in_order_with_the_options_of_the_command(fake):
    assert run(fake("assert '--overwrite' in sys.argv"), ["--overwrite"]) == 0
    assert fake.calls() == ["check", "run_id=x-align", "run_id=x"]


def test_all_stages_are_checked_before_the_first_one_starts(fake):
    body = f"assert sys.argv[2:] == ['--force', '--check', *{LINE!r}]; sys.exit(2)"
    assert run(fake(body), ["--force"]) == 2
    assert fake.calls() == ["check"]


@pytest.mark.parametrize(("body", "code"), [("sys.exit(76)", 76), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_the_first_failure_ends_the_command_with_its_exit_code(fake, body, code):
    assert run(fake(f"if 'align' in sys.argv[1]: {body}")) == code
    assert fake.calls() == ["check", "run_id=x-align"]


@pytest.mark.parametrize(("given", "ports"), [(None, [18457, 18458]), ("29500", [29501, 29502])])
def test_under_srun_every_stage_meets_at_a_port_of_its_own(fake, monkeypatch, given, ports):
    """Beside the one that Lightning makes of the job's number."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "123456", "MASTER_PORT": given}
    for name, value in job.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert SLURMEnvironment(auto_requeue=False).main_port + 1 == ports[0]
    if not given:
        monkeypatch.delenv("MASTER_PORT")  # Lightning's property sets it
    body = (
        "if sys.argv[1] == 'check': sys.exit(0)\n"
        f"ports = dict(zip(['run_id=x-align', 'run_id=x'], {ports}))\n"
        "assert int(os.environ['MASTER_PORT']) == ports[sys.argv[1]]"
    )
    assert run(fake(body)) == 0


def test_under_torchrun_every_stage_meets_at_a_port_of_its_own(fake, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    body = (
        "if sys.argv[1] == 'check': sys.exit(0)\n"
        "ports = {'run_id=x-align': '29501', 'run_id=x': '29502'}\n"
        "assert os.environ['MASTER_PORT'] == ports[sys.argv[1]]\n"
        "assert os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'False'"
    )
    assert run(fake(body)) == 0


COMMAND = """
import sys
from prism_deco import stages
real = stages.subprocess.Popen
script = "; ".join([
    "import signal, sys, time",
    LISTENS,
    "print('up', flush=True)",
    "time.sleep(600)",
])
def start(command, **options):
    return real([sys.executable, "-c", "" if "--check" in command else script], **options)
stages.subprocess.Popen = start
sys.exit(stages.run(["recipe=mini_two_stage", "run_id=x"]))
"""


@pytest.mark.parametrize("listens", ["signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))", "0"])
def test_a_signal_reaches_the_stage_and_no_other_is_started(listens):
    """Even one that comes while the stage's process is not ready for it yet."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = f"LISTENS = {listens!r}\n{COMMAND}"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert process.stdout.read() == ""
