"""Pretrains the miniature towers on the rendered world, in a few CPU minutes each.

python runs/reference/miniature/pretrain.py [mini_clip ...] --out DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from captioned_images import load_captions, normalise
from contrastive import ClipPretraining, SiglipPretraining
from masked import MaskedPretraining
from probe import probe
from safetensors.torch import save_file
from torch.optim.lr_scheduler import OneCycleLR

from prism_deco.backbones import VisionBackbone, build_backbone
from prism_deco.config import load_choice
from prism_deco.logs import configure_logging

log = logging.getLogger("prism_deco.pretrain")

OBJECTIVES = {"mini_clip": ClipPretraining, "mini_siglip": SiglipPretraining, "mini_dinov2": MaskedPretraining}
"""The objective of each shipped tower. None uses the renderer's labels."""

_PACKAGES = ("torch", "timm", "open_clip_torch", "numpy", "safetensors")


def pretrain_tower(
    name: str,
    out_dir: Path,
    seed: int = 0,
    steps: int = 700,
    batch_size: int = 64,
    images: int = 12_000,
    held_out: int = 500,
    probe_scenes: int = 2000,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
) -> dict[str, Any]:
    """Trains a tower and writes `<name>.safetensors` (float16, timm's names) and `<name>.json` (the record).

    Args:
        name: one of `OBJECTIVES`, a choice of `conf/backbone`.
        out_dir: folder for the two files.
        seed: seeds weights, order, sampled phrases and masks. The images are those of `seed + 1000`; the held-out
            images and the probe's scenes use other seeds.
        steps: optimizer steps.
        batch_size: images per step.
        images: number of distinct captioned images, each visited several times.
        held_out: number of held-out captioned images for the metrics of the record.
        probe_scenes: number of scenes to fit the linear probe on; a quarter as many test it.
        lr: peak learning rate (AdamW, one cycle).
        weight_decay: AdamW's, for all parameters.

    Returns:
        The record.
    """
    start = time.process_time()
    torch.manual_seed(seed)
    untrained = build_backbone(name, pretrained=False)
    data = load_captions(seed + 1000, images)
    test = load_captions(seed + 2000, held_out)
    objective = OBJECTIVES[name](load_choice("backbone", name)["model"], data[1] + test[1], seed)
    log.info("%s: %d steps of %d images", name, steps, batch_size)
    losses = _train(objective, untrained, data, steps, batch_size, lr, weight_decay, seed)
    objective.eval()
    with torch.no_grad():
        figures = objective.evaluate(_pixels(untrained, test[0]), test[1])

    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / f"{name}.safetensors"
    # float16 halves the file size; the towers are loaded as float32.
    save_file({key: value.half().contiguous() for key, value in objective.vit.state_dict().items()}, file)
    record = {
        "name": name,
        "command": f"python runs/reference/miniature/pretrain.py {name} --out DIR --seed {seed}",
        "settings": {
            "seed": seed,
            "steps": steps,
            "batch_size": batch_size,
            "images": images,
            "held_out": held_out,
            "probe_scenes": probe_scenes,
            "lr": lr,
            "weight_decay": weight_decay,
        },
        "objective": type(objective).__name__,
        "loss": {str(step): round(losses[step - 1], 4) for step in _milestones(steps)},
        "held_out": {key: round(value, 4) for key, value in figures.items()},
        "probe": probe(build_backbone(name, weights=str(file)), seed, probe_scenes, probe_scenes // 4).as_dict(),
        "probe_of_random_weights": probe(untrained, seed, probe_scenes, probe_scenes // 4).as_dict(),
        "cpu_seconds": round(time.process_time() - start),
        "versions": {package: version(package) for package in _PACKAGES},
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (out_dir / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    log.info("%s: %s", file, record["probe"])
    return record


def _train(
    objective: ClipPretraining | SiglipPretraining | MaskedPretraining,
    tower: VisionBackbone,
    data: tuple[torch.Tensor, list[str]],
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
) -> list[float]:
    """Trains `objective` in place; returns the loss of every step."""
    images, captions = data
    optimizer = torch.optim.AdamW(objective.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    order = torch.utils.data.RandomSampler(
        captions, num_samples=steps * batch_size, generator=torch.Generator().manual_seed(seed)
    )
    losses = []
    for step, rows in enumerate(torch.utils.data.BatchSampler(order, batch_size, drop_last=True), start=1):
        loss = objective(_pixels(tower, images[rows]), [captions[row] for row in rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step in _milestones(steps):
            log.info("step %d: loss %.4f", step, losses[-1])
    return losses


def _pixels(tower: VisionBackbone, images: torch.Tensor) -> torch.Tensor:
    (transform,) = tower.transform.towers.values()
    return normalise(images, transform.mean, transform.std)


def _milestones(steps: int) -> list[int]:
    """About ten evenly spaced steps, including the last one."""
    return sorted({*range(max(steps // 10, 1), steps, max(steps // 10, 1)), steps})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the miniature towers that ship with the package.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(OBJECTIVES)} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images (default: %(default)s)")
    args = parser.parse_args()
    unknown = set(args.names) - set(OBJECTIVES)
    if unknown:
        parser.error(f"unknown towers: {', '.join(sorted(unknown))}. Choices: {', '.join(OBJECTIVES)}.")
    configure_logging(debug=False)
    for name in args.names or OBJECTIVES:
        pretrain_tower(name, args.out, args.seed)


if __name__ == "__main__":
    main()
