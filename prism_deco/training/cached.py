"""Training on cached features: whether a run does, and what has to be there before it starts."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from prism_deco.backbones import VisionBackbone
from prism_deco.build import group
from prism_deco.config import cache_dir
from prism_deco.features import COMPUTE, FeatureCache, Key, at_rest, image_names
from prism_deco.features.key import names_hash
from prism_deco.files import write_json
from prism_deco.plan import plan_run
from prism_deco.plan.accelerators import accelerator_of
from prism_deco.plan.features import CachePlan, compute_of
from prism_deco.plan.flops import TrainingFlops
from prism_deco.plan.setup import setup_of
from prism_deco.sharing import mode
from prism_deco.training.datamodule import Conversations
from prism_deco.training.ranks import Ranks
from prism_deco.training.run_dir import Plan
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

RECORD = "features.json"
"""In the run's folder: the caches that it is trained on. A run that goes on does so as it began."""


@dataclass(frozen=True)
class Towers:
    """How a run gets its features.

    Attributes:
        caches: digests of the caches' keys; empty where the towers run in every step.
        tokens, dtype: of the cached features of an image.
    """

    caches: tuple[str, ...] = ()
    tokens: int = 0
    dtype: torch.dtype = torch.float32

    @contextmanager
    def placed(self, vlm: VLM) -> Iterator[None]:
        """Leaves the towers out of the model while it is trained, where they have nothing to do."""
        if not self.caches:
            yield
            return
        with at_rest(vlm, self.tokens, self.dtype):
            yield

    def counted(self, flops: TrainingFlops) -> TrainingFlops:
        """What a step costs."""
        return replace(flops, tower=0) if self.caches else flops


def prepare_features(config: DictConfig, plan: Plan, vlm: VLM, data: Conversations, ranks: Ranks) -> Towers:
    """Gives the data its features in place of pixels, if the run is to have them; builds what is missing.

    All processes must call it, with the weights of the towers that the run has, whole and on the CPU.

    Raises:
        UsageError: `trainer.feature_cache` is unknown, or the disk is too small.
    """
    asked = mode(config)
    if asked == "off" or not _shows_images(data):
        return _live(plan, ranks)
    device = ranks.device
    caches: list[FeatureCache] | None = None

    def decide() -> bool:
        nonlocal caches
        if asked == "on" or (plan.checkpoint and (plan.folder / RECORD).is_file()):
            caches = _caches(config, vlm, data)
            for cache in caches:
                cache.check_space()
            return True
        expected = None if plan.checkpoint else _expected(config, device)
        # The towers' hash and the images' names take time, and most runs can be told without them.
        if expected is None or not expected.pays(to_build=0):
            return False
        caches = _caches(config, vlm, data)
        return _pays(config, expected, caches)

    if not ranks.decide(decide):
        return _live(plan, ranks)
    caches = _caches(config, vlm, data) if caches is None else caches
    if ranks.is_main:
        write_json(plan.folder / RECORD, {"keys": [cache.key.digest for cache in caches]})
    for cache in caches:
        _complete(cache, config, vlm, device, ranks)
    if dist.is_initialized():
        dist.barrier()
    readers = {cache.key.data: cache.open() for cache in caches}
    data.use_features(readers)
    layout = caches[0].layout
    return Towers(tuple(cache.key.digest for cache in caches), layout.tokens, layout.dtype)


def _shows_images(data: Conversations) -> bool:
    return any(part.has_image.any() for part in (data.train_records, data.val_records))


def _live(plan: Plan, ranks: Ranks) -> Towers:
    if ranks.is_main:
        (plan.folder / RECORD).unlink(missing_ok=True)
    return Towers()


def _expected(config: DictConfig, device: torch.device) -> CachePlan | None:
    """What a cache would save; None where the run cannot be planned."""
    try:
        needs = plan_run(config, accelerator_name=accelerator_of(device)).needs
    except Exception as error:  # a plug-in's code may not bear being walked through without data
        log.warning("Whether cached features pay could not be planned (%s: %s)", type(error).__name__, error)
        return None
    return needs.cache if needs else None


def _pays(config: DictConfig, expected: CachePlan, caches: list[FeatureCache]) -> bool:
    runs, missing = config.trainer.feature_cache_runs, sum(cache.missing for cache in caches)
    if not expected.pays(runs, missing):
        return False
    try:
        for cache in caches:
            cache.check_space()
    except ValueError as error:
        log.warning("%s Training goes on without it.", error)
        return False
    ratio = expected.ratio(runs, missing)
    log.info("Cached features: %d images to compute, %.2f of the arithmetic of the run without", missing, ratio)
    return True


def _caches(config: DictConfig, vlm: VLM, data: Conversations) -> list[FeatureCache]:
    """One per file of records."""
    backbone, weights = vlm.backbone, vlm.backbone.sha256()
    caches = []
    for records, subsets, images in data.by_file:
        names = image_names(*subsets)
        if not names:
            continue
        key = Key(
            group(config, "backbone"),
            weights,
            backbone.transform,
            records.data_hash,
            names_hash(names),
            images.least_side,
            compute_of(setup_of(config)),
            vlm.projector.pooling,
            vlm.projector.compressed_grid,
        )
        caches.append(FeatureCache(cache_dir() / "features", key, names, images, backbone.embed_dim))
    return caches


def _complete(cache: FeatureCache, config: DictConfig, vlm: VLM, device: torch.device, ranks: Ranks) -> None:
    """Verifies a cache and builds what it lacks; the processes of a node share both."""
    damaged = cache.find_damaged(ranks.local_rank, ranks.devices)
    if dist.is_initialized():
        # Nodes may have disks of their own.
        everybody: list[Any] = [None] * ranks.size
        dist.all_gather_object(everybody, (ranks.rank // ranks.devices, damaged))
        damaged = sorted(shard for node, found in everybody if node == ranks.rank // ranks.devices for shard in found)
    if not damaged:
        log.info("Features: %s has those of all %d images", cache.shards.folder, cache.layout.images)
        return
    started = time.monotonic()
    log.info(
        "Features: %d of %d shards (%d images in all, %.2f GB) are computed into %s",
        *(len(damaged), cache.layout.shards, cache.layout.images, cache.layout.bytes / 1e9, cache.shards.folder),
    )
    with _computing(vlm.backbone, device, cache.key.compute) as backbone:
        share, workers = ranks.rank / ranks.size, config.data.num_workers
        cache.build(damaged, backbone, vlm.projector.compress, device=device, first=share, num_workers=workers)
    log.info("Features: complete after %.1f s", time.monotonic() - started)


@contextmanager
def _computing(backbone: VisionBackbone, device: torch.device, compute: str) -> Iterator[VisionBackbone]:
    """The towers on the device, in the type of a training step."""
    if compute == "bfloat16":
        yield copy.deepcopy(backbone).to(device, COMPUTE[compute])
    elif device.type == "cpu":
        yield backbone
    else:
        yield copy.deepcopy(backbone).to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
