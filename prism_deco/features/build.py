"""Building a cache: every image once through the towers, by as many processes as there are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prism_deco.backbones.transforms import BackboneTransform
from prism_deco.data.images import ImageSource, load_image
from prism_deco.features.key import BATCH
from prism_deco.features.shards import MISSING, Locks, Shards

log = logging.getLogger(__name__)

Encode = Callable[[dict[str, Tensor]], Tensor]
"""Per tower float32[n, 3, S, S] on the CPU -> features dtype[n, T, D] on the CPU."""

REPORT_EVERY = 60.0
"""Seconds between two lines in the log."""


def build(
    shards: Shards,
    wanted: Sequence[int],
    encode: Encode,
    transform: BackboneTransform,
    *,
    first: float = 0.0,
    num_workers: int = 0,
) -> None:
    """Makes the wanted shards be there; returns when all are, whoever built them.

    Any number of processes may build the same cache at once, ranks of a run as well as other runs: whoever holds a
    shard's lock builds it, the others take the next free one and in the end wait for those under way.

    Args:
        wanted: shards that are missing or damaged.
        first: where in `wanted` to begin, as a share of it; builders that begin apart meet late.
        num_workers: processes that decode images.
    """
    begin = int(first * len(wanted))
    left = [*wanted[begin:], *wanted[:begin]]
    with Locks(shards.folder) as locks:
        while left:
            left = _build_free(shards, left, encode, transform, locks, num_workers)
            if left:
                log.info("Features: waiting for %d shards that other processes build", len(left))
                locks.take(left[0], wait=True)
                locks.release(left[0])
                left = [shard for shard in left if shards.problem(shard) is not None]


def _build_free(
    shards: Shards,
    wanted: Sequence[int],
    encode: Encode,
    transform: BackboneTransform,
    locks: Locks,
    num_workers: int,
) -> list[int]:
    """Builds those shards that nobody else does, and returns the others."""
    taken: list[int] = []

    def batches() -> Iterator[list[int]]:
        # Loader processes are a few batches ahead of the tower, and so are the locks.
        for shard in wanted:
            if not locks.take(shard):
                taken.append(shard)
                continue
            problem = shards.problem(shard)
            if problem is None:
                locks.release(shard)
                continue
            if problem != MISSING:
                log.warning("%s %s: building it again", shards.path(shard), problem)
            rows = list(shards.layout.rows_of(shard))
            yield from (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))

    loader: DataLoader[_Images] = DataLoader(
        _Pixels(shards.names, shards.images, transform),  # type: ignore[arg-type]
        batch_sampler=batches(),  # type: ignore[arg-type]  # any iterable of lists
        collate_fn=_collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # the run's own random numbers stay as they are
    )
    progress, writer, bad = _Progress(len(wanted)), None, []
    for batch in loader:
        shard = batch.rows[0] // shards.layout.rows
        writer = writer or shards.write(shard)
        writer.append(encode(batch.pixels))
        bad += batch.bad
        if batch.rows[-1] == shards.layout.rows_of(shard)[-1]:
            writer.commit(bad)
            locks.release(shard)
            progress.shard_done()
            writer, bad = None, []
        progress.images_done(len(batch.rows))
    return taken


class _Images(NamedTuple):
    """A batch for the tower; the pixels of bad rows are blank."""

    rows: list[int]
    pixels: dict[str, Tensor]
    bad: list[int]


class _Pixels(Dataset[tuple[int, dict[str, Tensor], bool]]):
    """Row -> (row, pixels per tower float32[3, S, S], whether the image could not be read)."""

    def __init__(self, names: Sequence[str], images: ImageSource, transform: BackboneTransform):
        self._names = names
        self._images = images
        self._transform = transform

    def __getitem__(self, row: int) -> tuple[int, dict[str, Tensor], bool]:
        try:
            return row, self._transform(load_image(self._images, self._names[row])), False
        except OSError as error:
            log.warning("%s", error)
        blank = self._transform(Image.new("RGB", (8, 8)))
        # As for a bad image in training: zero is each tower's mean colour after its normalisation.
        return row, {tower: torch.zeros_like(pixels) for tower, pixels in blank.items()}, True


def _collate(images: list[tuple[int, dict[str, Tensor], bool]]) -> _Images:
    rows, pixels, bad = zip(*images, strict=True)
    stacked = {tower: torch.stack([p[tower] for p in pixels]) for tower in pixels[0]}
    return _Images(list(rows), stacked, [row for row, is_bad in zip(rows, bad, strict=True) if is_bad])


class _Progress:
    """Says now and then how far the build is."""

    def __init__(self, shards: int):
        self._shards = shards
        self._done = self._images = 0
        self._began = self._said = time.monotonic()

    def images_done(self, count: int) -> None:
        self._images += count
        now = time.monotonic()
        if now - self._said > REPORT_EVERY:
            self._said = now
            rate = self._images / (now - self._began)
            log.info("Features: %d of %d shards built here, %.1f images/s", self._done, self._shards, rate)

    def shard_done(self) -> None:
        self._done += 1
