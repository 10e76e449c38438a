"""Training on cached features: where a run meets `prism_deco.features`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from omegaconf import DictConfig

from prism_deco.build import group
from prism_deco.config import cache_dir
from prism_deco.distributed import World
from prism_deco.features import CachedBackbone, CachedExamples, FeatureCache
from prism_deco.training.datamodule import Conversations
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)


def build_caches(config: DictConfig, vlm: VLM, data: Conversations, world: World) -> list[FeatureCache]:
    """The caches of the training and the validation records, complete. All processes must call it.

    Args:
        vlm: with the towers that the run has, whole and on the CPU.

    Returns:
        Empty if `trainer.feature_cache` is off or no record has an image.

    Raises:
        UsageError: the disk is too small, or cannot be locked.
    """
    if not config.trainer.feature_cache:
        return []
    if not (data.train_records.has_image.any() or data.val_records.has_image.any()):
        log.info("No record has an image: there are no features to cache")
        return []
    weights, settings, root = vlm.backbone.sha256(), group(config, "backbone"), cache_dir() / "features"
    caches = [
        FeatureCache(root, vlm.backbone, settings, weights, _compute(config.trainer), examples)
        for examples in (data.train_examples, data.val_examples)
    ]
    for cache in caches:
        world.decide(cache.check_space)
        workers = config.data.num_workers
        cache.build(world.device, rank=world.local_rank, ranks=world.devices, num_workers=workers)
    world.barrier()
    return caches


@contextmanager
def cached(vlm: VLM, data: Conversations, caches: Sequence[FeatureCache]) -> Iterator[None]:
    """Puts features in the place of images and towers while the model is trained; changes nothing without caches."""
    if not caches:
        yield
        return
    backbone, train_examples, val_examples = vlm.backbone, data.train_examples, data.val_examples
    vlm.backbone = CachedBackbone(backbone, caches[0].dtype)
    data.train_examples, data.val_examples = map(CachedExamples, caches)
    try:
        yield
    finally:
        vlm.backbone, data.train_examples, data.val_examples = backbone, train_examples, val_examples


def _compute(trainer: DictConfig) -> str:
    """How the towers compute in a training step: one of `features.COMPUTE`."""
    if "bf16" not in trainer.precision:
        return "float32"
    return "bfloat16" if trainer.strategy == "fsdp" else "autocast"
