"""Training on cached features (`trainer.feature_cache`): replacements for the towers and the data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from prism_deco.backbones import VisionBackbone
from prism_deco.build import group
from prism_deco.config import cache_dir
from prism_deco.data.loader import Examples, loader_workers
from prism_deco.distributed import World
from prism_deco.features import FeatureCache, shard_path
from prism_deco.tensors import open_safetensors
from prism_deco.training.datamodule import Conversations
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

TOWER = "features"
"""The key of the features in an example's `pixels`."""


class CachedExamples(Examples):
    """The examples of a complete cache, with features instead of pixels. Picklable, for loader processes."""

    def __init__(self, cache: FeatureCache):
        vars(self).update(vars(cache.examples))
        self._folder = cache.folder
        self._shard_images = cache.shard_images
        # An array: reference counting would make each forked loader process copy the pages of a list.
        self._names = np.array([name.encode() for name in cache.names])
        self._unreadable = cache.unreadable()

    def read_image(self, record: str, name: str) -> tuple[dict[str, Tensor], bool]:
        unreadable = name in self._unreadable
        if unreadable:
            super().read_image(record, name)  # fails again, and so applies `data.on_bad_image`
        return {TOWER: self.features(name)}, unreadable

    def features(self, name: str) -> Tensor:
        """The features of an image, dtype[N, D]."""
        index = int(np.searchsorted(self._names, name.encode()))
        assert self._names[index] == name.encode(), name
        shard, row = divmod(index, self._shard_images)
        # Opened for each read: a cache may have more shards than a process may have open files.
        with open_safetensors(shard_path(self._folder, shard), "Run again: it will be computed again.") as file:
            return file.get_slice("features")[row]


class CachedBackbone(VisionBackbone):
    """Replaces the towers: returns the features that it gets instead of pixels.

    It has no parameters, so training neither moves the towers to the device nor shards them.

    Args:
        backbone: the towers.
        dtype: of the cached features.
    """

    def __init__(self, backbone: VisionBackbone, dtype: torch.dtype):
        super().__init__()
        self.towers = (TOWER,)
        self.image_size = backbone.image_size
        self.patch_size = backbone.patch_size
        self.grid = backbone.grid
        self.embed_dim = backbone.embed_dim
        self.transform = backbone.transform
        self._dtype = dtype

    @property
    def blocks(self) -> list[nn.Module]:
        return []

    def features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        return pixels[TOWER]

    def blank(self, device: torch.device) -> dict[str, Tensor]:
        return {TOWER: torch.zeros(1, self.num_patches, self.embed_dim, dtype=self._dtype, device=device)}


def build_caches(config: DictConfig, vlm: VLM, data: Conversations, world: World) -> list[FeatureCache]:
    """Completes the caches of the training and the validation records. All processes must call this.

    Args:
        vlm: its towers must be unsharded and on the CPU.

    Returns:
        Empty if no record has an image.

    Raises:
        UsageError: the disk is too small or does not support locks.
    """
    if not (data.train_records.has_image.any() or data.val_records.has_image.any()):
        log.info("No record has an image; nothing to cache")
        return []
    compute = "float32"
    if "bf16" in config.trainer.precision:
        compute = "bfloat16" if config.trainer.strategy == "fsdp" else "autocast"
    weights = vlm.backbone.sha256()
    caches = []
    for examples in (data.train_examples, data.val_examples):
        cache = FeatureCache(
            cache_dir() / "features", vlm.backbone, group(config, "backbone"), weights, compute, examples
        )
        world.decide(cache.check_space)
        workers = loader_workers(config.data.num_workers, gpu=world.gpu, ranks=world.devices)
        cache.build(world.device, rank=world.local_rank, ranks=world.devices, num_workers=workers)
        caches.append(cache)
    world.barrier()
    return caches


@contextmanager
def cached(vlm: VLM, data: Conversations, caches: Sequence[FeatureCache]) -> Iterator[None]:
    """Replaces towers and images with cached features while the model trains."""
    backbone, train_examples, val_examples = vlm.backbone, data.train_examples, data.val_examples
    vlm.backbone = CachedBackbone(backbone, caches[0].dtype)
    data.train_examples, data.val_examples = map(CachedExamples, caches)
    try:
        yield
    finally:
        vlm.backbone, data.train_examples, data.val_examples = backbone, train_examples, val_examples
