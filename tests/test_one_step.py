"""How much of the package a short training goes through: what a newcomer has to read to know what a step does."""

import json
import os
import subprocess
import sys

import pytest

from prism_deco.build import group, record_options
from prism_deco.config import cache_dir, load_config
from prism_deco.data import build_source
from prism_deco.data.records import open_parts

FUNCTIONS = 330
FILES = 65

WORLD = ["data.train_images=40", "data.val_images=4", "data.test_images=4", "data.val_items=4", "data.test_items=4"]
STEPS = ["recipe.max_steps=2", "evaluate.benchmarks=null", "trainer.samples=0", "trainer.val_every=2"]

COUNT = """
import json, sys
from pathlib import Path
import prism_deco

package = Path(prism_deco.__file__).parent
codes = set()

def record(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(str(package)):
        codes.add(frame.f_code)

sys.setprofile(record)
from prism_deco.cli import main
exit_code = main(sys.argv[2:])
sys.setprofile(None)
assert exit_code == 0
OPTIMIZED = 1  # the bodies of modules and classes are not
called = []
for code in codes:
    # Comprehensions and lambdas are part of the function that they stand in.
    if code.co_flags & OPTIMIZED and not code.co_name.startswith("<"):
        called.append([str(Path(code.co_filename).relative_to(package)), code.co_qualname])
Path(sys.argv[1]).write_text(json.dumps(sorted(called)))
"""


@pytest.mark.slow
def test_two_steps_of_the_miniature_stay_within_a_few_files(tmp_path):
    config = load_config(WORLD)
    open_parts(build_source(group(config, "data")), cache_dir(), **record_options(config))  # rendered and indexed once
    arguments = ["train", *WORLD, *STEPS, f"runs_dir={tmp_path}", "run_id=run"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", COUNT, str(tmp_path / "called"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    called = json.loads((tmp_path / "called").read_text())
    files = {file for file, _ in called}
    assert {"cli.py", "training/module.py", "vlm.py"} <= files
    assert not [file for file in files if file.startswith(("plan/", "evaluation/", "report/", "sweep/"))]
    assert len(called) <= FUNCTIONS, called
    assert len(files) <= FILES, sorted(files)
