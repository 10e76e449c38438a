"""A cache of features as a run sees it: complete, and read row by row."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prism_deco.backbones import VisionBackbone
from prism_deco.data.images import ImageSource
from prism_deco.data.records import Record
from prism_deco.errors import UsageError
from prism_deco.features.build import Encode, build
from prism_deco.features.key import COMPUTE, Key, Layout
from prism_deco.features.shards import Shards


def image_names(*parts: Iterable[Record]) -> list[str]:
    """The images that records show, each once, in the order of a cache's rows."""
    return sorted({name for records in parts for record in records for name in record.images})


class FeatureCache:
    """The features of the images of one file of records.

    Args:
        folder: of all caches.
        names: from `image_names`.
        images: where they are.
        dim: channels D of a feature.
    """

    def __init__(self, folder: Path, key: Key, names: Sequence[str], images: ImageSource, dim: int):
        self.key = key
        tokens = key.grid[0] * key.grid[1]
        self.layout = Layout(len(names), tokens, dim, COMPUTE[key.compute])
        self.shards = Shards(folder / key.digest, self.layout, names, images)

    @property
    def missing(self) -> int:
        """Images whose features are not there yet, by the shards' records alone."""
        shards = [n for n in range(self.layout.shards) if not self.shards.is_recorded(n)]
        return sum(len(self.layout.rows_of(shard)) for shard in shards)

    def check_space(self) -> None:
        """`UsageError` where what is missing does not fit on the disk."""
        needed = sum(self.layout.size(n) for n in range(self.layout.shards) if not self.shards.is_recorded(n))
        place = next(path for path in (self.shards.folder, *self.shards.folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UsageError(
                f"The cache of features in {self.shards.folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                "free: choose another disk with the environment variable PRISM_DECO_CACHE, or "
                "trainer.feature_cache=off."
            )

    def find_damaged(self, rank: int = 0, ranks: int = 1) -> list[int]:
        """Every `ranks`-th shard from `rank` on that cannot be used; see `Shards`."""
        return [n for n in range(rank, self.layout.shards, ranks) if self.shards.problem(n) is not None]

    def build(
        self,
        wanted: Sequence[int],
        backbone: VisionBackbone,
        compress: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        first: float = 0.0,
        num_workers: int = 0,
    ) -> None:
        """Computes the wanted shards, see `build.build`.

        Args:
            backbone: on the device, in the type that `key.compute` says.
            compress: the projector's, where features are stored pooled.
        """
        self.shards.create(self.key)
        encode = encoder(backbone, compress, self.key.compute, device)
        build(self.shards, wanted, encode, backbone.transform, first=first, num_workers=num_workers)

    def open(self) -> FeatureReader:
        """Reads it, once it is complete."""
        return FeatureReader(self.shards)


def encoder(
    backbone: VisionBackbone, compress: Callable[[Tensor], Tensor], compute: str, device: torch.device
) -> Encode:
    """Pixels to features as a training step computes them, on the device."""

    @torch.no_grad()
    def encode(pixels: dict[str, Tensor]) -> Tensor:
        precision: AbstractContextManager[object] = nullcontext()
        if compute == "autocast":
            precision = torch.autocast(device.type, torch.bfloat16)
        with precision:
            features = compress(backbone({tower: values.to(device) for tower, values in pixels.items()}))
        return features.to(COMPUTE[compute]).cpu()

    return encode


class FeatureReader:
    """The features of an image by its name, for loader processes: small, and picklable.

    Rows are read, not mapped: a map's pages count as memory of every process that touched them, over an epoch the
    whole cache, and a file that is cut short would kill the process. All processes share the system's page cache
    either way.
    """

    def __init__(self, shards: Shards):
        self._folder = shards.folder
        self._layout = shards.layout
        # Sorted hashes instead of a dictionary: 16 bytes per image, and loader processes share them.
        hashes = np.array([_hash(name) for name in shards.names], dtype=np.uint64)
        self._rows = np.argsort(hashes).astype(np.int32)
        self._hashes = hashes[self._rows]
        if len(np.unique(self._hashes)) < len(self._hashes):
            raise UsageError("Two names of images have one hash: rename one, or trainer.feature_cache=off.")
        self._bad = np.zeros(len(hashes), dtype=np.bool_)
        self._offsets = []
        for shard in range(self._layout.shards):
            self._bad[shards.bad_rows(shard)] = True
            self._offsets.append(len(self._layout.header(shard)))

    @property
    def tokens(self) -> int:
        """Features T of an image."""
        return self._layout.tokens

    @property
    def dtype(self) -> torch.dtype:
        return self._layout.dtype

    def read(self, name: str) -> Tensor:
        """dtype[T, D]; those of the blank image for an image that could not be read."""
        layout = self._layout
        shard, row = divmod(self._row(name), layout.rows)
        features = torch.empty(layout.tokens, layout.dim, dtype=layout.dtype)
        # Opened each time: a cache may have more shards than a process may have open files.
        with (self._folder / f"{shard:05d}.safetensors").open("rb", buffering=0) as file:
            file.seek(self._offsets[shard] + row * layout.row_bytes)
            read = file.readinto(features.view(-1).view(torch.uint8).numpy().data)
        if read != layout.row_bytes:
            raise OSError(f"{file.name} was cut short while it was in use: run again, it will be built anew.")
        return features

    def is_bad(self, name: str) -> bool:
        """Whether the image could not be read when its features were to be computed."""
        return bool(self._bad[self._row(name)])

    def _row(self, name: str) -> int:
        key = _hash(name)
        place = int(np.searchsorted(self._hashes, key))
        assert place < len(self._hashes) and self._hashes[place] == key, name
        return int(self._rows[place])


def _hash(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()))
