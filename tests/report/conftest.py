"""Synthetic sweeps as training and evaluation write them: run folders and a ledger, from a seeded generator."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_deco.config import load_config, save_config

# The study's script, which tests its claims, is not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2] / "runs/reference/study"))

# Accuracy of each projector, far enough apart for means to differ clearly.
SKILL = {
    "linear": 0.62,
    "avgpool": 0.58,
    "maxpool": 0.52,
    "qformer": 0.30,
    "c_abstractor": 0.45,
    "d_abstractor": 0.42,
}
# Secondary metrics and their breakdowns, by benchmark.
SECOND = {
    "pope": lambda v: {"f1": v + 2, "f1/random": 1.0, "generate/accuracy": v - 3, "generate/accuracy/random": 1.0},
    "refcoco": lambda v: {"accuracy_pad_corrected": v / 2, "accuracy_lenient_pad_corrected": 1.0},
    "vqav2": lambda v: {"accuracy_official": 1.0, "accuracy/number": 1.0},
}
MINI = ("pope", "refcoco", "refcocoplus", "refcocog", "vizwiz", "vqav2", "gqa", "textvqa")


def targets(benchmark, n, kind=None):
    """Targets in the benchmark's format; `kind` names the family if the benchmark's name does not."""
    rng = random.Random(benchmark)
    name = kind or benchmark.removeprefix("mini_")
    for k in range(n):
        if name == "pope":
            subset = ("random", "popular", "adversarial")[k * 3 // n]
            yield {"answer": ("yes", "no")[k % 2], "subset": subset, "variant": "likelihood"}
        elif name.startswith("refcoco"):
            x, y = rng.randint(0, 60) / 100, rng.randint(0, 60) / 100
            yield {"box": [x, y, x + 0.3, y + 0.3], "width": 64, "height": 64}
        elif name in ("vizwiz", "vqav2", "textvqa"):
            yield {"answers": [rng.choice(["red", "2", "yes"])] * 10, "type": "other"}
        elif name == "mme":
            yield {"answer": ("yes", "no")[k % 2], "task": ("count", "color")[k * 2 // n]}
        else:
            yield {"answer": rng.choice(["red", "blue", "yes", "no"])}


def write_scores(folder, benchmark, skill, seed, n=60, kind=None):
    """Writes predictions.jsonl and metrics.json; an item is correct if its difficulty, plus noise, is below `skill`."""
    rng, difficulty = random.Random(f"{seed}{benchmark}{skill}"), random.Random(f"items{benchmark}")
    folder.mkdir(parents=True)
    parts, lines = {}, []
    for k, target in enumerate(targets(benchmark, n, kind)):
        right = 0.7 * difficulty.random() + 0.3 * rng.random() < skill
        record = {
            "question_id": f"{k:04d}",
            "image": f"images/{k}.png",
            "prompt": f"What is in picture {k}?",
            "output": "{}" if "variant" in target else "text",
            "answer": "text",
            "target": target,
            "score": float(right),
        }
        lines.append(json.dumps(record))
        parts.setdefault(target.get("subset"), []).append(100.0 * right)
    means = [sum(values) / len(values) for values in parts.values()]
    value = sum(means) / len(means)
    half = 196 * math.sqrt(value / 100 * (1 - value / 100) / n)
    metrics = {
        "benchmark": benchmark,
        "metrics": {"accuracy": value, **SECOND.get(benchmark.removeprefix("mini_"), lambda _: {})(value)},
        "primary": "accuracy",
        "n": n,
        "invalid_rate": 0.0,
        "interval95": [value - half, value + half],
        "decoding": {"strategy": "greedy", "max_new_tokens": 32, "model": "m"},
        "prompt_hash": f"prompts of {benchmark}",
        "data_hash": f"questions of {benchmark}",
    }
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return value


def write_curves(folder, skill, seed, steps):
    rng = random.Random(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(9, steps, 10):
            loss = 0.5 + (1.4 - skill) * math.exp(-step / 80) + rng.gauss(0, 0.05)
            speed = 30 * (1.5 - skill) + rng.gauss(0, 1)
            file.write(json.dumps({"step": step, "train/loss": loss, "train/samples_per_s": speed}) + "\n")
            if (step + 1) % 50 == 0:
                file.write(json.dumps({"step": step, "val/loss": loss + 0.05, "train/loss": None}) + "\n")


def write_run(folder, *overrides, benchmarks=MINI, steps=200, n=60, skill=None, state="done", **manifest):
    """Writes a run folder; returns the score by benchmark."""
    config = load_config(overrides)
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    tokens = config.projector.num_tokens or 64
    if skill is None:
        skill = SKILL[config.projector.name] - 0.02 * abs(math.log2(tokens / 32))
    (folder / "status.json").write_text(json.dumps({"state": state, "seconds": 61.5}))
    write_curves(folder, skill, config.seed, steps)
    if state not in ("done", "trained"):
        return {}
    content = {
        "run_id": folder.name,
        "seed": config.seed,
        "data_hash": "d" * 64,
        "code_version": "0.1.0",
        "machine": {"platform": "Linux", "cpus": 2},
        "params": {"total": 1_000_000, "trained": 700_000},
        "tokens": {"visual_in": max(64, tokens), "visual_out": tokens},
        "steps": steps,
        "samples": 16 * steps,
        "bad_images": 0,
        **manifest,
    }
    (folder / "manifest.json").write_text(json.dumps(content))
    prefix = "mini_" if config.data.name == "shapes" else ""
    return {
        prefix + name: write_scores(folder / "eval" / (prefix + name), prefix + name, skill, config.seed, n)
        for name in benchmarks
    }


def write_ledger(folder, cells):
    """Writes ledger.json from cells {id, labels, overrides, state, ...}."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"state": "done", "attempts": 1, "started": 0.0, "seconds": 60.0, "reason": None, "log_tail": None}
    ledger = {"name": folder.name, "cells": [defaults | cell for cell in cells]}
    (folder / "ledger.json").write_text(json.dumps(ledger))


@pytest.fixture(scope="session")
def make():
    """The writers above, as a namespace."""
    return SimpleNamespace(run=write_run, scores=write_scores, ledger=write_ledger, skill=SKILL)


@pytest.fixture(scope="session")
def mini_sweep(tmp_path_factory):
    """Two rows, two projectors, three seeds: nine cells done, one failed, one running, one planned."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    cells = []
    for row, backbone in (("M1", "mini_clip"), ("M2", "mini_siglip")):
        for projector in ("avgpool", "c_abstractor"):
            for seed in (7, 8, 9):
                name = f"{row}-{projector}-{seed}"
                overrides = [f"backbone={backbone}", f"projector={projector}", f"seed={seed}"]
                labels = {"row": row, "projector": projector, "seed": seed}
                cells.append({"id": name, "labels": labels, "overrides": overrides})
                if name == "M2-c_abstractor-8":
                    cells[-1] |= {"state": "failed", "reason": "ValueError: <b>bad</b>", "log_tail": ["one", "<two>"]}
                elif name == "M2-c_abstractor-9":
                    cells[-1] |= {"state": "running"}
                    write_run(folder / name, *overrides, state="running")
                    (folder / name / "train.log").write_text("starting\nstep 3 of 200\n")
                elif name == "M1-c_abstractor-9":
                    cells[-1] |= {"state": "planned", "attempts": 0}
                else:
                    write_run(folder / name, *overrides)
    write_ledger(folder, cells)
    return folder
