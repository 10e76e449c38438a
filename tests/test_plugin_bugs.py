"""A bug in a user's plug-in ends in a traceback that names the user's file and line, wherever it is met."""

import json
import os
import subprocess
import sys
import traceback
from uuid import uuid4

import pytest

from prism_deco.cli import main

BUGGY = """
from torch import Tensor, nn

from prism_deco.projectors import PROJECTORS, Projector, square_grid


@PROJECTORS.register("NAME")
class Buggy(Projector):
    def __init__(self, in_dim, out_dim, in_grid, num_tokens):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        self.layer = nn.Linear(in_dim, out_dim)

    def project(self, features):
        if MET:
            batch, patches = features.shape
        return self.layer(features)[:, : self.num_tokens]
"""
EVERYWHERE = "True"
IN_TRAINING = "type(features) is Tensor"  # a plan passes tensors without values


@pytest.fixture
def line(colors, tmp_path, monkeypatch):
    """(when the bug is met) -> arguments of a run with that plug-in."""

    def make(met):
        name = f"buggy_{uuid4().hex}"  # what is planned is kept by name
        (tmp_path / "buggy.py").write_text(BUGGY.replace("MET", met).replace("NAME", name))
        (tmp_path / f"{name}.yaml").write_text("num_tokens: ${recipe.num_tokens}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
        return [f"projector={tmp_path}/{name}.yaml", "plugins=[buggy]", "data=llava", f"data.json={colors}/train.json",
                f"data.image_root={colors}/images", "data.val_fraction=0", "data.num_workers=0",
                "evaluate.benchmarks=null", "backbone.pretrained=false", "recipe.max_steps=2",
                "recipe.global_batch_size=4", "recipe.micro_batch_size=2", "trainer.accelerator=cpu",
                "recipe.standardise_features=false"]  # fmt: skip

    yield make
    from prism_deco.projectors import PROJECTORS

    sys.modules.pop("buggy", None)
    for name in [name for name in PROJECTORS._entries if name.startswith("buggy_")]:
        del PROJECTORS._entries[name]


WHERE = 15
"""The line of the bug."""


@pytest.mark.parametrize(
    ("command", "met"),
    [(["plan"], EVERYWHERE), (["train"], IN_TRAINING), (["train"], EVERYWHERE), (["train", "--check"], EVERYWHERE)],
)
def test_it_is_raised_as_it_is(line, tmp_path, command, met):
    runs = [] if command == ["plan"] else [f"runs_dir={tmp_path}/runs", "run_id=x"]
    with pytest.raises(ValueError, match="too many values to unpack") as raised:
        main([*command, *line(met), *runs])
    frame = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno) == (str(tmp_path / "buggy.py"), WHERE)
    if met == IN_TRAINING:
        status = json.loads((tmp_path / "runs/x/status.json").read_text())
        assert status["state"] == "failed" and status["reason"].endswith(
            f"(expected 2) ({frame.filename}, line {WHERE})"
        )


@pytest.mark.slow
def test_in_several_processes_it_is_shown_once(line, tmp_path):
    more = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    command = [sys.executable, "-m", "prism_deco.cli", "train", *line(IN_TRAINING), *more, f"runs_dir={tmp_path}/runs"]
    done = subprocess.run([*command, "run_id=x"], capture_output=True, text=True, timeout=500)
    said = [row for row in done.stderr.splitlines() if "^^" not in row]
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    assert said[-3:] == [
        f'  File "{tmp_path}/buggy.py", line {WHERE}, in project',
        "    batch, patches = features.shape",
        "ValueError: too many values to unpack (expected 2)",
    ]
    status = json.loads((tmp_path / "runs/x/status.json").read_text())
    assert status["state"] == "failed" and status["reason"].endswith(f"({tmp_path}/buggy.py, line {WHERE})")


@pytest.mark.slow
def test_a_sweep_names_the_line_and_keeps_the_traceback(line, tmp_path):
    assert main(["sweep", *line(EVERYWHERE), f"runs_dir={tmp_path}/sweeps", "name=s", "seed=1,2"]) == 1
    cell, _ = json.loads((tmp_path / "sweeps/s/ledger.json").read_text())["cells"]
    assert cell["reason"].endswith(f"too many values to unpack (expected 2) ({tmp_path}/buggy.py, line {WHERE})")
    assert "    batch, patches = features.shape" in cell["log_tail"]
