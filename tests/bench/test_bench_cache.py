"""Live and cached steps at tiny sizes: that both are timed fairly, and what is reported of them."""

import io
import json
from dataclasses import replace

import pytest
import torch
from prism_deco.plan.features import CachePlan
from rich.console import Console

from prism_deco.bench.cache import bench_cache
from prism_deco.bench.cache_report import Result, Way, as_json, render
from prism_deco.bench.measure import Usage
from prism_deco.bench.presets import CACHE
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.plan.flops import training_flops

TINY = ["recipe=prism", "projector=avgpool", "recipe.num_tokens=4", "backbone=mini_siglip", "backbone.image_size=32",
        "llm=mini_phi"]  # fmt: skip


def _usages(seconds, cpu):
    return [Usage(a, b) for a, b in zip(seconds, cpu, strict=True)]


def _result():
    # 100 images, each shown once; towers are half, reading is free.
    plan = CachePlan(100, 5, 100.0, 10**9, 0.0, 2e11, None, "")
    live = Way(_usages([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]), _usages([8.0, 8.0, 18.0], [4.0, 4.0, 9.0]))
    cached = Way(_usages([1.0, 1.0, 1.0], [0.5, 0.5, 0.5]), _usages([4.0, 3.0, 9.0], [2.0, 1.5, 4.5]))
    shape = {"hardware": "abacus", "threads": 1}
    return Result("B5", shape, plan, live, cached, Usage(6.0, 3.0), Usage(0.1, 0.1), 1e-7)


def test_ratios_by_hand():
    result = _result()
    # Rounds of 10, 10 and 20 seconds against 5, 4 and 10; a round's share of the build is one second.
    assert result.measured(None, "seconds") == (0.5, 0.4, 0.5)
    assert result.measured(6, "seconds") == (0.55, 0.5, 0.6)
    assert result.measured(6, "cpu_seconds") == (0.55, 0.5, 0.6)
    assert result.measured(None, "seconds", loading=False) == (0.5, 0.375, 0.5)
    assert result.predicted(None) == 0.5 and result.predicted(4) == 1 - 0.5 * 0.75


def test_what_is_printed_and_written():
    result = _result()
    console = Console(width=150, file=io.StringIO())
    console.print(render([result, replace(result, name="B1", plan=replace(result.plan, tower=10**7))], 6))
    text = console.file.getvalue()
    for part in ("abacus, 1 threads", "50%", "6 x", "there", "0.55 (0.50-0.60)", "0.50 (0.38-0.50)"):
        assert part in text
    [content] = as_json([result], 6)
    assert content["tower_share"] == 0.5 and content["ratios"][0]["measured seconds"] == (0.55, 0.5, 0.6)
    assert [row["auto"] for row in content["ratios"]] == ["on", "on"]
    assert [row["auto"] for row in as_json([result], 2)[0]["ratios"]] == ["off", "on"]


def test_steps_are_measured_from_the_files_on(tmp_path):
    config = load_config(TINY)
    result = bench_cache(config, "tiny", tmp_path, batch_size=2, steps=2, rounds=2)
    assert result.difference < 1e-5
    assert result.plan.images == result.plan.visits == 4 and result.shape["cache_bytes"] == result.plan.bytes
    assert result.plan.tower == training_flops(config).tower and 0 < result.plan.tower_share < 1
    for way in (result.live, result.cached):
        assert len(way.loading) == len(way.computing) == 2
        assert all(part.cpu_seconds > 0 for part in (*way.loading, *way.computing))
    assert result.build.cpu_seconds > 0 and list((tmp_path / "features").glob("*/00000.safetensors"))
    with pytest.raises(ValueError, match="rounds=1 shows no spread"):
        bench_cache(config, "tiny", tmp_path, rounds=1)


def test_the_command(tmp_path, capsys):
    threads = torch.get_num_threads()
    sizes = ["--batch-size", "2", "--steps", "1", "--rounds", "2", "--shown", "5", "--out", str(tmp_path / "b.json")]
    try:
        assert main(["bench", "cache", "backbone.image_size=32", "recipe.num_tokens=4", "trainer.threads=1",
                     "--presets", "B5", *sizes]) == 0  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    [content] = json.loads((tmp_path / "b.json").read_text())
    assert content["name"] == "B5" and content["shape"]["hardware"] and content["ratios"][0]["shown"] == 5
    assert "5 x" in capsys.readouterr().out


def test_presets_divide_the_work_as_the_paper_s_cells_do():
    shares = {}
    for name, overrides in CACHE.items():
        costs = training_flops(load_config(overrides))
        # About 90 tokens of text, of them 60 supervised, and the visual ones.
        shares[name] = costs.tower / costs.step(images=1, positions=126, pairs=126**2, targets=60)
    assert shares == pytest.approx({"B5": 0.51, "B4": 0.15, "B1": 0.03}, abs=0.02)
