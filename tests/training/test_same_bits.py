"""What README promises: on the same machine, with the same versions, a command gives the same numbers to the bit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = [
    "data.train_images=120",
    "data.val_images=30",
    "data.test_images=1",
    "data.val_items=24",
    "recipe.max_steps=12",
]


def train(folder: Path) -> dict[str, str]:
    """The SHA-256 of the trained weights and of the answers; the world is built anew each time."""
    command = [sys.executable, "-m", "prism_deco.cli", "train", *SHORT, f"runs_dir={folder}", "run_id=run"]
    # Two threads, as on a laptop: sums must not depend on which is first. One that waits does not spin.
    environment = {"PRISM_DECO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, check=True, env=os.environ | environment, capture_output=True)
    files = [*(folder / "run" / "model").glob("*.safetensors"), *(folder / "run" / "eval").glob("*/predictions.jsonl")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_the_default_run_twice_gives_the_same_bits(tmp_path):
    first, second = (train(tmp_path / name) for name in ("first", "second"))
    assert first == second
    assert sum(name.endswith("predictions.jsonl") for name in first) == 8
    assert "run/model/model.safetensors" in first
