"""The two stages of LLaVA-1.5 in miniature, as one command in real processes, interrupted and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import prism_deco

WORLD = ["data.train_images=48", "data.val_images=12", "data.test_images=4", "data.val_items=4", "data.test_items=4"]
COMMAND = [
    "recipe=mini_two_stage", "run_id=x", "backbone=mini_clip", "llm=mini_llama", "evaluate.benchmarks=null",
    "trainer.threads=1", "trainer.val_every=1", "trainer.checkpoint_every=2", "recipe.max_steps=4",
    "align.recipe.max_steps=60", *WORLD,
]  # fmt: skip


def _start(runs: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prism_deco.cli", "train", *COMMAND, f"runs_dir={runs}", *more]
    return subprocess.Popen(command, env=environment)


def _steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row["step"] for row in rows if "train/loss" in row]


@pytest.mark.slow
def test_one_command_trains_all_stages_and_goes_on_where_it_was_stopped(tmp_path):
    align, finetune = (tmp_path / name for name in ("x-align", "x"))
    process = _start(tmp_path, "data.limit=64", "align.recipe.epochs=100")
    try:
        deadline = time.monotonic() + 300
        while len(_steps(align)) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 75
    finally:
        process.kill()
    stopped = _steps(align)
    assert 3 <= len(stopped) < 60 and not finetune.exists()
    assert json.loads((align / "status.json").read_text())["state"] == "preempted"

    assert _start(tmp_path, "data.limit=64", "align.recipe.epochs=100").wait(timeout=400) == 0
    assert _steps(align) == list(range(1, 61)) and _steps(finetune) == [1, 2, 3, 4]
    assert f"start_from: {align}" in (finetune / "config.yaml").read_text()

    first, second = (load_file(run / "model" / "model.safetensors") for run in (align, finetune))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]) != name.startswith("projector."), name
    adapters = load_file(finetune / "model" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in adapters.values()), "B began at zero"
    trained = json.loads((align / "manifest.json").read_text())["params"]["trained"]
    model = prism_deco.load(finetune)
    assert trained == sum(p.numel() for p in model.vlm.projector.parameters())
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(image)
    assert isinstance(model.generate([image], ["What color is it?"], max_new_tokens=3)[0], str)
