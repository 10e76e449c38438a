"""Training steps on cached features beside steps that run the towers, with what their cache takes to build."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import AdamW

from prism_deco.bench.cache_report import Result, Way
from prism_deco.bench.data import photographs
from prism_deco.bench.measure import Usage, usage
from prism_deco.bench.train_report import hardware
from prism_deco.bench.variants import GRAD_CLIP
from prism_deco.build import build_model, group
from prism_deco.data.examples import Examples
from prism_deco.data.loader import Collate
from prism_deco.data.records import open_records
from prism_deco.errors import UsageError
from prism_deco.features import FeatureCache, Key, image_names
from prism_deco.features.key import names_hash
from prism_deco.llms import LanguageModel
from prism_deco.plan import DEFAULT_MFU
from prism_deco.plan.accelerators import peak_flops
from prism_deco.plan.features import CachePlan, compute_of
from prism_deco.plan.flops import training_flops
from prism_deco.plan.setup import setup_of
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

LIVE, CACHED = "live", "cached"
TOLERANCE = 1e-4
"""Relative difference between the losses of both ways that is float error."""

_WORDS = ("red", "small", "round", "left", "of", "the", "large", "square", "and", "blue")


def bench_cache(
    config: DictConfig,
    name: str,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    steps: int = 4,
    rounds: int = 5,
    seed: int = 0,
) -> Result:
    """Measures training steps of a configured model, its weights random, live and cached step by step in turns.

    Both ways begin at the files: live ones decode images, cached ones read features.

    Args:
        folder: new; images and the cache go there.
        steps: of a round, which shows every image once.

    Raises:
        UsageError: the ways do not compute the same, or too few rounds.
    """
    if rounds < 2:
        raise UsageError(f"rounds={rounds} shows no spread: use 2 or more.")
    device = torch.device(device)
    torch.manual_seed(seed)
    config = config.copy()
    config.backbone.pretrained = config.llm.pretrained = False
    vlm, llm = build_model(config, device=device)
    vlm.train()
    live = _album(folder, vlm, llm, config, batch_size * steps, seed)
    cache = _cache(folder, config, vlm, live)
    log.info("%s: building the features of %d images", name, cache.layout.images)
    with usage(device) as build:
        cache.build(range(cache.layout.shards), vlm.backbone, vlm.projector.compress, device=device)
    cached = _album(folder, vlm, llm, config, batch_size * steps, seed)
    with usage(device) as opened:
        assert not cache.find_damaged()
        cached.features = cache.open()
    collate = Collate(vlm.projector.num_tokens, batch_size, pack=config.recipe.packing)
    step = _stepper(vlm, config)
    ways = {LIVE: live, CACHED: cached}
    difference = _difference(vlm, [collate.batch([e[i] for i in range(batch_size)]) for e in ways.values()], device)
    taken: dict[str, list[tuple[Usage, Usage]]] = {way: [] for way in ways}
    log.info("%s: %d rounds of %d steps of %d records, on %s", name, rounds, steps, batch_size, device)
    for round_ in range(-1, rounds):
        spent = {way: (Usage(), Usage()) for way in ways}
        for first in range(0, batch_size * steps, batch_size):
            for way, examples in ways.items():
                with usage(device) as loading:
                    batch = collate.batch([examples[i] for i in range(first, first + batch_size)]).to(device)
                with usage(device) as computing:
                    step(batch)
                for total, part in zip(spent[way], (loading, computing), strict=True):
                    total.seconds += part.seconds
                    total.cpu_seconds += part.cpu_seconds
        if round_ >= 0:
            for way in ways:
                taken[way].append(spent[way])
    results = {way: Way([a for a, _ in spent], [b for _, b in spent]) for way, spent in taken.items()}
    shape = _shape(config, vlm, cache, batch_size, steps, device)
    plan = _plan(config, cache, [collate.batch([cached[i]]) for i in range(len(cached))], device)
    return Result(name, shape, plan, results[LIVE], results[CACHED], build, opened, difference)


def _album(folder: Path, vlm: VLM, llm: LanguageModel, config: DictConfig, count: int, seed: int) -> Examples:
    """Photographs and talks about them, of about a hundred tokens each."""
    if not (folder / "album").exists():
        photographs(folder / "album", count)
        rng = np.random.default_rng(seed)
        entries = json.loads((folder / "album" / "train.json").read_text())
        for entry in entries:
            for turn in entry["conversations"][1::2]:
                turn["value"] = " ".join(rng.choice(_WORDS, 24)) + "."
        (folder / "album" / "train.json").write_text(json.dumps(entries))
    records = open_records(folder / "album" / "train.json", folder)
    limits = {"max_text_tokens": config.recipe.max_text_tokens, "tokens_per_image": vlm.projector.num_tokens}
    return Examples(records, folder / "album" / "images", llm, vlm.backbone.transform, **limits)


def _cache(folder: Path, config: DictConfig, vlm: VLM, examples: Examples) -> FeatureCache:
    names = image_names(examples.records)
    backbone, projector = vlm.backbone, vlm.projector
    key = Key(
        group(config, "backbone"), backbone.sha256(), backbone.transform, examples.records.data_hash,
        names_hash(names), None, compute_of(setup_of(config)), projector.pooling, projector.compressed_grid,
    )  # fmt: skip
    return FeatureCache(folder / "features", key, names, examples.images, backbone.embed_dim)


def _stepper(vlm: VLM, config: DictConfig) -> Callable[[Batch], None]:
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=1e-5)
    autocast = compute_of(setup_of(config)) == "autocast"

    def step(batch: Batch) -> None:
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=autocast):
            loss = vlm(batch).total / batch.num_targets
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def _difference(vlm: VLM, batches: Sequence[Batch], device: torch.device) -> float:
    first, second = (float(vlm(batch.to(device)).total) for batch in batches)
    difference = abs(second / first - 1)
    if not difference < TOLERANCE:
        raise UsageError(f"Live and cached losses differ by {difference:.1e}, so that their times say nothing.")
    return difference


def _plan(config: DictConfig, cache: FeatureCache, batches: Sequence[Batch], device: torch.device) -> CachePlan:
    """Of a run that shows every image once.

    Args:
        batches: of a record each.
    """
    costs, lengths = training_flops(config), np.array([batch.input_ids.shape[1] for batch in batches])
    flops = costs.step(
        images=len(batches),
        positions=float(lengths.sum()),
        pairs=float((lengths**2).sum()),
        targets=sum(batch.num_targets for batch in batches),
    )
    peak = peak_flops(device)
    speed = DEFAULT_MFU * peak if peak else None
    return CachePlan.of([cache.layout], visits=len(batches), tower=costs.tower, flops=flops, speed=speed)


def _shape(
    config: DictConfig, vlm: VLM, cache: FeatureCache, batch_size: int, steps: int, device: torch.device
) -> dict[str, Any]:
    return {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backbone": config.backbone.name,
        "image_size": vlm.backbone.image_size,
        "llm": OmegaConf.to_container(config.llm.architecture, resolve=True),
        "projector": config.projector.name,
        "patches": vlm.backbone.num_patches,
        "features": cache.layout.tokens,
        "precision": config.trainer.precision,
        "batch_size": batch_size,
        "steps": steps,
        "images": cache.layout.images,
        "cache_bytes": cache.layout.bytes,
    }
