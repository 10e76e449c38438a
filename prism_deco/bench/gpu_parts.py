"""The parts of `prism-deco bench gpu`, most important first."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import prism_deco
from prism_deco.bench.data import bench_data
from prism_deco.bench.gpu import Bench, Finding, Part
from prism_deco.bench.measure import usage
from prism_deco.bench.records import Group, build_batches, encode
from prism_deco.bench.train import GROUPED, PLAIN, bench_train, compare_steps, random_model, step_variants
from prism_deco.build import build_model
from prism_deco.files import read_json
from prism_deco.machine import cores
from prism_deco.plan.devices import GIB, peak_flops, setup_of
from prism_deco.plan.fake_memory import PassShape
from prism_deco.plan.flops import training_flops
from prism_deco.plan.memory import step_memory
from prism_deco.projectors import build_projector
from prism_deco.sequence import build_batch
from prism_deco.training.optim import adamw
from prism_deco.training.progress import read_metrics

BATCH = {"B1": 16, "B4": 16, "B5": 32, "B6_lora": 8, "vicuna_lora": 8}
"""Records per step, in one forward pass."""
MFU_GOALS = {"B1": 0.5, "B4": 0.5, "B5": 0.4}


def agreement(bench: Bench, precision: str) -> Finding:
    """Compares our losses and gradients with transformers' LLaVA, and packed with padded batches."""
    config = bench.cell("B5", f"trainer.precision={precision}")
    vlm = random_model(config, bench.device)
    autocast = precision.startswith("bf16")
    ours, padded, _ = step_variants(config, vlm, batch_size=4, steps=1)
    found = {
        "transformers": compare_steps(vlm, ours, padded, autocast),
        "padded": compare_steps(vlm, ours, replace(padded, loss=ours.loss), autocast),
    }
    text = "; ".join(f"{name}: loss {f['loss']:.0e}, gradient {f['gradient']:.0e}" for name, f in found.items())
    return Finding(text, True, found)


def pooling(bench: Bench) -> Finding:
    """Checks that the gradient of average pooling with overlapping windows is deterministic."""
    torch.manual_seed(0)
    projector = build_projector("avgpool", 1024, 1024, (27, 27), 144).to(bench.device)
    gradients = []
    features = torch.randn(4, 27 * 27, 1024, device=bench.device, requires_grad=True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(projector(features).square().sum(), [features])
        gradients.append(gradient)
    return Finding("gradients of two backward passes", torch.equal(*gradients))


def _train(bench: Bench, name: str, *settings: str, kill: bool = False) -> Path:
    """Trains the miniature by the command line; with `kill`, kills it after its first checkpoint and resumes."""
    steps, every = (6, 2) if bench.rehearse else (200, 50)
    small = ("data.train_images=40", "data.val_images=20", "data.test_images=20") if bench.rehearse else ()
    kind = "gpu" if bench.device.type == "cuda" else "cpu"
    folder = bench.folder / "runs" / name
    command = [
        *(sys.executable, "-m", "prism_deco.cli", "train", f"runs_dir={folder.parent}", f"run_id={name}"),
        *("evaluate.benchmarks=null", "trainer.samples=0", f"trainer.accelerator={kind}", *small),
        *(f"recipe.max_steps={steps}", f"trainer.checkpoint_every={every}", *settings),
    ]
    with tempfile.TemporaryFile() as output:
        if kill:
            shutil.rmtree(folder, ignore_errors=True)
            process = subprocess.Popen(command, stdout=output, stderr=output)
            while process.poll() is None and not any(folder.glob("checkpoints/*/*.json")):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise RuntimeError(f"{name} ended before it could be killed: see {folder}")
        subprocess.run(command, check=True, stdout=output, stderr=output)
    return folder


def same_losses(bench: Bench, name: str, *settings: str, kill: bool = False) -> Finding:
    """Checks that another run has the losses of the plain one."""
    runs = [_train(bench, "plain"), _train(bench, name, *settings, kill=kill)]
    plain, other = (_losses(run) for run in runs)
    difference = max(abs(a / b - 1) for a, b in zip(plain, other, strict=True))
    text = f"losses of {len(plain)} steps: {'the same bits' if difference == 0 else f'within {difference:.0e}'}"
    return Finding(text, difference < 1e-3, {"plain": plain, name: other})


def _losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def scores(bench: Bench) -> Finding:
    """Compares the scores of one run on this device and on the CPU, by the command line."""
    run, limit = _train(bench, "plain"), 20 if bench.rehearse else 500
    found: dict[str, dict[str, float]] = {}
    seconds = {}
    for device in (bench.device.type, "cpu"):
        out = bench.folder / "runs" / f"eval_{device}"
        asked = ("benchmark=mini_pope,mini_vqav2", f"limit={limit}", f"--out={out}", f"--device={device}")
        start = time.monotonic()
        command = [sys.executable, "-m", "prism_deco.cli", "evaluate", str(run), *asked, "--dtype=float32"]
        subprocess.run(command, check=True, capture_output=True)
        seconds[device] = time.monotonic() - start
        found[device] = {}
        for path in out.glob("*/metrics.json"):
            for key, value in read_json(path, ["metrics"])["metrics"].items():
                found[device][f"{path.parent.name}/{key}"] = value
    here, cpu = found[bench.device.type], found["cpu"]
    worst = max(abs(here[key] - cpu[key]) for key in cpu)
    text = f"{len(cpu)} metrics differ by {worst:.2f} at most; {seconds[bench.device.type]:.0f} s with loading"
    return Finding(text, worst <= 1.0, {"scores": found, "seconds": seconds})


def memory(bench: Bench, cell: str) -> Finding:
    """Compares the planned peak memory of a step with the measured one."""
    config = bench.cell(cell)
    torch.cuda.reset_peak_memory_stats(bench.device)
    held = torch.cuda.memory_allocated(bench.device)
    vlm = random_model(config, bench.device).train()
    rng, side = np.random.default_rng(0), vlm.backbone.image_size
    group: Group = []
    for _ in range(BATCH[cell]):
        pixels = {tower: torch.randn(3, side, side) for tower in vlm.backbone.towers}
        group.append((encode([(200, 100), (100, 50)], True, 1000, rng, max_text_tokens=512), pixels))
    (batch,) = build_batches(vlm, [group], bench.device, pack=True)
    assert batch.lengths is not None
    optimizer = adamw(vlm, config.recipe)
    # The first step creates the optimizer's moments, so the second one has the peak.
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = vlm(batch).total / len(batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated(bench.device) - held
    visual = vlm.projector.num_tokens
    shape = PassShape(len(group), batch.lengths[0], visual, len(batch.targets), passes=1, packed=True)
    plan = step_memory(config, setup_of(config), shape)
    text = f"planned {plan.peak / GIB:.1f} GiB ({plan.when}), measured {measured / GIB:.1f}"
    return Finding(text, abs(plan.peak / measured - 1) <= 0.15, {"planned": plan.peak, "measured": measured})


def speed(bench: Bench, cell: str, *settings: str, alone: bool = False) -> Finding:
    """Measures our step, and transformers' unless `alone`: samples and tokens per second, MFU, memory."""
    config = bench.cell(cell, *settings)
    batch, steps = (3, 2) if bench.rehearse else (BATCH[cell], 4)
    result = bench_train(config, device=bench.device, batch_size=batch, steps=steps, rounds=2, alone=alone)
    facts: dict[str, Any] = {row.name: row.facts for row in result.rows} | result.about
    ours = result.rows[0].facts
    text = f"{ours['samples_per_s']:.1f} samples/s, {ours['tokens_per_s']:.0f} tokens/s"
    passed = None
    if peak := peak_flops(bench.device):
        mfu = ours["samples_per_s"] * result.about["about"]["flops_per_sample"] / peak
        facts["mfu"] = mfu
        passed = mfu >= MFU_GOALS[cell] if cell in MFU_GOALS and not alone else None
        text += f", MFU {mfu:.0%}"
    if not alone:
        # Of median, smallest and largest ratio, the median.
        (padded, *_), (grouped, *_) = ours[f"times {PLAIN}"], ours[f"times {GROUPED}"]
        share = ours[f"memory of {PLAIN}"]
        text += f"; {padded:.1f}x padded, {grouped:.1f}x grouped, {share or math.nan:.2f} of its memory"
        if bench.device.type == "cuda":
            # Goals of speed and memory hold in addition to the one of MFU, if there is one.
            passed = passed is not False and padded >= 2 and share <= 0.4
    return Finding(text, passed, facts)


def towers(bench: Bench, cell: str) -> Finding:
    """Measures the frozen towers alone."""
    config, images = bench.cell(cell), 2 if bench.rehearse else 64
    backbone = random_model(config, bench.device).backbone
    pixels = {t: torch.randn(images, *p.shape[1:]).to(bench.device) for t, p in backbone.blank(bench.device).items()}
    autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=config.trainer.precision.startswith("bf16"))

    def step() -> None:
        with autocast:
            backbone(pixels)

    per_s = images / _seconds(bench, step)
    peak = peak_flops(bench.device)
    mfu = per_s * training_flops(config).tower / peak if peak else None
    text = f"{per_s:.1f} images/s" + (f", MFU {mfu:.0%}" if mfu else "")
    return Finding(text, None, {"images_per_s": per_s, "mfu": mfu})


def _seconds(bench: Bench, run: Callable[[], Any]) -> float:
    """The shortest of three runs after a warm-up."""
    run()
    taken = []
    for _ in range(3):
        with usage(bench.device) as one:
            run()
        taken.append(one.seconds)
    return min(taken)


def input_pipeline(bench: Bench) -> Finding:
    """Compares the images per second that this machine's cores prepare with those that cell B5's step consumes."""
    config = bench.cell("B5")
    vlm, llm = build_model(config, device="meta")
    count = 8 if bench.rehearse else 64
    with tempfile.TemporaryDirectory() as folder:
        side, transform = vlm.backbone.image_size, vlm.backbone.transform
        rows = bench_data(Path(folder), llm, transform, side=side, count=count, repeats=2, micro_batch_size=8).rows
    images = next(row for row in rows if row.name == "prism_deco: images alone")
    per_core = count / min(images.times("cpu_seconds"))
    need = bench.facts("speed_B5").get("prism_deco", {}).get("samples_per_s")
    text = f"{per_core:.0f} images/s per core, {cores()} cores; B5 takes {need or math.nan:.0f}"
    return Finding(text, None if need is None else cores() * per_core >= need, {"per_core": per_core, "need": need})


def generation(bench: Bench, cell: str) -> Finding:
    """Measures short answers of a cell with random weights, as in a full-size evaluation."""
    config = bench.cell(cell)
    vlm = random_model(config, bench.device).eval()
    count, rng = 4 if bench.rehearse else 64, np.random.default_rng(0)
    encoded = [encode([(40, 1)], True, 500, rng, max_text_tokens=60) for _ in range(count)]
    pixels: dict[str, Tensor] = {
        tower: blank.expand(count, -1, -1, -1) for tower, blank in vlm.backbone.blank(bench.device).items()
    }
    if config.trainer.precision.startswith("bf16"):
        vlm.cast(torch.bfloat16)
    batch = build_batch(encoded, vlm.projector.num_tokens, pixels=pixels, left_pad=True).to(bench.device)
    never = vlm.lm.config.vocab_size  # an id that no token has, so that every answer has 8 tokens
    seconds = _seconds(bench, lambda: vlm.generate(batch, None, max_new_tokens=8, eos_ids=[never], pad_id=0))
    return Finding(f"{count / seconds:.1f} questions/s of 8 tokens", None, {"questions_per_s": count / seconds})


def relevance(bench: Bench) -> Finding:
    """Compares R-GAE maps of the trained miniature with the CPU's, and measures answers per second."""
    run = _train(bench, "plain")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    here, cpu = (
        partial(prism_deco.load(run, device=device).relevance, image, "What is it?", "a red circle")
        for device in (str(bench.device), "cpu")
    )
    same = torch.allclose(here().text_to_patch, cpu().text_to_patch, rtol=1e-2, atol=1e-4)
    per_s = 1 / _seconds(bench, here)
    return Finding(f"{per_s:.1f} answers/s, the maps of the CPU", same, {"answers_per_s": per_s})


PARTS = (
    Part("agreement_fp32", 1, partial(agreement, precision="32-true")),
    Part("agreement_bf16", 1, partial(agreement, precision="bf16-mixed")),
    Part("pooling_twice", 0.1, pooling),
    Part("resume_after_kill", 1.5, partial(same_losses, name="killed", kill=True)),
    Part("fsdp_of_one", 1, lambda bench: same_losses(bench, "fsdp", "trainer.strategy=fsdp")),
    Part("scores", 1, scores),
    *(Part(f"memory_{cell}", 0.7, partial(memory, cell=cell), cuda=True) for cell in ("B5", "B1", "B4", "B6_lora")),
    *(Part(f"speed_{cell}", 2, partial(speed, cell=cell)) for cell in ("B5", "B4", "vicuna_lora", "B1")),
    Part("speed_B5_padded", 0.7, lambda bench: speed(bench, "B5", "recipe.packing=false", alone=True)),
    Part("speed_B5_compiled", 2, lambda bench: speed(bench, "B5", "trainer.compile=true", alone=True), cuda=True),
    Part("speed_B4_compiled", 2, lambda bench: speed(bench, "B4", "trainer.compile=true", alone=True), cuda=True),
    *(Part(f"towers_{cell}", 0.5, partial(towers, cell=cell)) for cell in ("B5", "B1")),
    Part("input_pipeline", 0.5, input_pipeline),
    Part("generation_B5", 0.5, partial(generation, cell="B5")),
    Part("relevance", 0.5, relevance),
)
"""About 25 minutes on an H200, estimated."""
