"""The weights of a frozen tower while a bf16-mixed run trains."""

import json

import pytest
import torch

from prism_deco.backbones import build_backbone
from prism_deco.build import build_model, group
from prism_deco.config import load_config, read_config
from prism_deco.training.model_folder import TOWER_RECORD
from prism_deco.training.progress import read_metrics
from prism_deco.training.trainer import half_precision_tower

HALF = "trainer.precision=bf16-mixed"


@pytest.mark.parametrize(
    ("override", "dtype"),
    [(HALF, torch.bfloat16), ("trainer.precision=32-true", torch.float32), ("recipe.tower=full", torch.float32)],
)
def test_it_is_as_exact_as_before_afterwards(override, dtype):
    config = load_config(["backbone=mini_dinov2", HALF, override])
    vlm, _ = build_model(config)
    tower = vlm.backbone
    before, buffers = tower.sha256(), {name: buffer.dtype for name, buffer in tower.named_buffers()}
    pixels = {name: torch.randn(2, 3, tower.image_size, tower.image_size) for name in tower.towers}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        exact = tower(pixels).float()
        with half_precision_tower(vlm, config.trainer):
            assert {parameter.dtype for parameter in tower.parameters()} == {dtype}
            assert {name: buffer.dtype for name, buffer in tower.named_buffers()} == buffers
            found = tower(pixels).float()
    assert tower.sha256() == before
    # Three significant digits of bfloat16, through a few blocks.
    assert (found - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(found, exact) == (dtype == torch.float32)


def test_a_run_shows_samples_and_stores_the_exact_tower(start, tmp_path):
    job = start(HALF, "trainer.samples=1", "data.val_fraction=0.3")
    assert job.wait() == [0], job.log.read_text()
    run = tmp_path / "run"
    assert [row for row in read_metrics(run) if "val/loss" in row]
    config = read_config(run / "config.yaml")
    torch.manual_seed(config.seed)
    tower = build_backbone(group(config, "backbone"))
    assert json.loads((run / "model" / TOWER_RECORD).read_text())["sha256"] == tower.sha256()
