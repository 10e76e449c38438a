"""A cache of the frozen towers' features on disk (`trainer.feature_cache=true`).

The towers are frozen and images are not augmented, so an image has the same features in every epoch, for every seed and
in every run with the same towers. They are computed once, before the first step; training then reads them instead of
images (`training.feature_cache`).

A cache is a folder named by the hash of its `key.json`. Images are sorted by name and stored in shards:
`00000.safetensors` has one tensor `features`, dtype[n, N, D], and `00000.json` is its record. Both are written under a
temporary name, synced and renamed, the record last. A shard without a record is incomplete, so after a killed run the
next one continues. A cache does not notice that an image was replaced under its old name: delete the folder then.

Shapes: N patches, D channels.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prism_deco.backbones import VisionBackbone
from prism_deco.data.images import load_image
from prism_deco.data.loader import Examples, blank_pixels
from prism_deco.errors import UsageError
from prism_deco.files import check_writable, file_sha256, nearest_existing, write_json, write_whole
from prism_deco.tensors import write_safetensors

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of what is stored. Increase it with every change, so that older caches are not used."""

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.bfloat16}
"""How towers compute, and the dtype in which their features are stored. Under autocast to bfloat16, a tower's residual
stream is float32, but it is stored in bfloat16, as the next matrix product would round it. A projector that begins with
a matrix product gets the same bits; one that begins with a norm gets a rounded input."""

BATCH = 32
"""Images per forward pass. Kernels may round differently for other batch sizes: with a fixed size, and shards of whole
batches, features do not depend on which process computes them."""

SHARD_BYTES, SHARD_IMAGES = 2**28, 512
"""Maximum size of a shard, which holds at least one batch."""

_ORIGIN = ("weights", "pretrained", "hub", "file", "file_gb")
"""Keys of the `backbone` group that say where the weights come from. The cache's key has their hash instead."""


class FeatureCache:
    """The cached features of a data set's images.

    Args:
        root: folder of all caches.
        backbone: the towers, unsharded and on the CPU.
        settings: the `backbone` group of the configuration.
        weights: `backbone.sha256()`.
        compute: one of `COMPUTE`.
        examples: whose images are cached.

    Attributes:
        digest: names the cache's folder.
        shards: names of the images in each shard.
    """

    def __init__(
        self,
        root: Path,
        backbone: VisionBackbone,
        settings: Mapping[str, Any],
        weights: str,
        compute: str,
        examples: Examples,
    ):
        self.backbone = backbone
        self.compute = compute
        self.dtype = COMPUTE[compute]
        self.examples = examples
        # Every image once, in an order that does not depend on that of the records.
        self.names = sorted({name for record in examples.records for name in record.images})
        self.key = {
            "format": FORMAT,
            "backbone": {name: value for name, value in settings.items() if name not in _ORIGIN},
            "weights": weights,
            "transform": asdict(backbone.transform),
            "compute": compute,
            "data": examples.records.data_hash,
            "images": os.path.realpath(str(examples.images)),
            "names": hashlib.sha256("\0".join(self.names).encode()).hexdigest(),  # no file name contains NUL
            "least_side": examples.images.least_side,
        }
        self.digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / self.digest
        self.image_bytes = backbone.num_patches * backbone.embed_dim * self.dtype.itemsize
        # Rounded down to whole batches, but at least one (see `BATCH`).
        self.shard_images = max(BATCH, min(SHARD_IMAGES, SHARD_BYTES // self.image_bytes) // BATCH * BATCH)
        starts = range(0, len(self.names), self.shard_images)
        self.shards = [self.names[start : start + self.shard_images] for start in starts]

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return shard_path(self.folder, shard)

    def check_space(self) -> None:
        """`UsageError` if the cache cannot be written, or the shards without a record do not fit on the disk."""
        check_writable(self.folder, "Point PRISM_DECO_CACHE at another folder, or set trainer.feature_cache=false.")
        missing = [names for shard, names in enumerate(self.shards) if not self._record_path(shard).is_file()]
        needed = sum(map(len, missing)) * self.image_bytes
        free = shutil.disk_usage(nearest_existing(self.folder)).free
        if needed > free:
            raise UsageError(
                f"The feature cache {self.folder} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free: "
                "point PRISM_DECO_CACHE at another disk, or set trainer.feature_cache=false."
            )

    def build(self, device: torch.device, *, rank: int = 0, ranks: int = 1, num_workers: int = 0) -> None:
        """Computes this rank's missing or damaged shards: every `ranks`-th one, starting at `rank`.

        Another run with the same cache waits until this process has finished, and then uses its shards.
        """
        if not self.shards:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # One lock per rank, so that the ranks of a run do not wait for each other. Shards are checked under the lock:
        # another run may have written them while this one waited.
        with _lock(self.folder / f".lock{rank}"):
            wanted = []
            for shard in range(rank, len(self.shards), ranks):
                problem = self.problem(shard)
                if problem is None:
                    continue
                wanted.append(shard)
                if self.path(shard).exists():
                    log.warning("%s %s; computing it again", self.path(shard), problem)
            if wanted:
                write_json(self.folder / "key.json", self.key)
                self._compute(wanted, device, num_workers)

    def problem(self, shard: int) -> str | None:
        """Why a shard cannot be used; None if it can.

        A file is hashed only if its size or modification time has changed since it was written; a copy is hashed once.
        """
        record = self._record(shard)
        path = self.path(shard)
        if not record or not path.is_file():
            return "is incomplete"
        if record["stamp"] != _stamp(path):
            if record["sha256"] != file_sha256(path):
                return "does not have the content that was written"
            self._write_record(shard, record | {"stamp": _stamp(path)})
        # The shard has a blank image for each of these: if one can be read by now, the shard is out of date.
        for name in record["unreadable"]:
            _, still_unreadable = _Pixels(self.examples, [name])[0]
            if not still_unreadable:
                return f"lacks the image {name}, which can be read now"
        return None

    def unreadable(self) -> set[str]:
        """The images that could not be read, for which a complete cache has the features of a blank image."""
        return {name for shard in range(len(self.shards)) for name in self._record(shard)["unreadable"]}

    def _compute(self, shards: Sequence[int], device: torch.device, num_workers: int) -> None:
        names = [name for shard in shards for name in self.shards[shard]]
        size = len(names) * self.image_bytes / 1e9
        log.info("Feature cache: computing %d images (%.2f GB) in %s", len(names), size, self.folder)
        loader = DataLoader(
            _Pixels(self.examples, names),
            batch_size=BATCH,  # all shards but the last are whole batches, so no batch spans two shards
            num_workers=num_workers,
            generator=torch.Generator(),  # else the seed of workers is drawn from the global one, which the run uses
        )
        batches = iter(loader)
        # A copy, since the run's own towers keep their device and dtype.
        towers = copy.deepcopy(self.backbone).to(device, torch.bfloat16 if self.compute == "bfloat16" else None)
        start = reported = time.monotonic()
        done = 0
        for shard in shards:
            features: list[Tensor] = []
            unreadable: list[str] = []
            for _ in range(0, len(self.shards[shard]), BATCH):
                pixels, failed = next(batches)
                features.append(self._encode(towers, pixels, device))
                unreadable += [name for name in failed if name]
            self._write(shard, torch.cat(features), unreadable)
            done += len(self.shards[shard])
            if time.monotonic() - reported > 60:
                reported = time.monotonic()
                log.info("Feature cache: %d of %d images, %.1f images/s", done, len(names), done / (reported - start))
        log.info("Feature cache: %d images computed in %.1f s", len(names), time.monotonic() - start)

    @torch.no_grad()
    def _encode(self, towers: VisionBackbone, pixels: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Per tower float32[n, 3, S, S] on the CPU -> dtype[n, N, D] on the CPU, computed as in a training step."""
        with torch.autocast(device.type, torch.bfloat16, enabled=self.compute == "autocast"):
            features = towers({name: images.to(device) for name, images in pixels.items()})
        return features.to("cpu", self.dtype)

    def _write(self, shard: int, features: Tensor, unreadable: list[str]) -> None:
        path = self.path(shard)
        building = path.with_name(f".{path.name}.tmp")
        sha256 = write_safetensors(building, {"features": features})
        # If the process dies between these two, the file has no record, or an older one, whose hash it must match.
        os.replace(building, path)
        self._write_record(shard, {"sha256": sha256, "stamp": _stamp(path), "unreadable": unreadable})

    def _record_path(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".json")

    def _record(self, shard: int) -> dict[str, Any]:
        """The record of a shard; empty if it is missing or damaged."""
        try:
            return json.loads(self._record_path(shard).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _write_record(self, shard: int, record: Mapping[str, Any]) -> None:
        write_whole(self._record_path(shard), json.dumps(record))


class _Pixels(Dataset[tuple[dict[str, Tensor], str]]):
    """Per named image: its pixels, tower -> float32[3, S, S], and ""; if it cannot be read, blank ones and its name."""

    def __init__(self, examples: Examples, names: Sequence[str]):
        self._images = examples.images
        self._transform = examples.transform
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], str]:
        name = self._names[index]
        try:
            return self._transform(load_image(self._images, name)), ""
        except OSError as error:
            log.warning("%s", error)
            return blank_pixels(self._transform), name


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard, in the folder of its cache."""
    return folder / f"{shard:05d}.safetensors"


def _stamp(path: Path) -> list[int]:
    """Size and modification time, which change when a file is written or replaced."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes, which the system releases if the process is killed."""
    with path.open("a") as file:
        try:
            # Not flock, whose lock forked loader processes would inherit.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Systems report a lock that another process holds by either error.
        except (BlockingIOError, PermissionError):
            log.info("Feature cache: waiting for another process that writes to %s", path.parent)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be locked ({error}): point PRISM_DECO_CACHE at another disk, or set "
                "trainer.feature_cache=false."
            ) from error
        yield
