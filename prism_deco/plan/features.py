"""What a cache of frozen features takes and saves, and whether it pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prism_deco.features import COMPUTE, Layout
from prism_deco.plan.setup import Setup
from prism_deco.projectors import Projector

MARGIN = 3.0
"""An image must be shown that often, over all runs that share the cache, to be put into it: building computes it once
and waits for decoding and the disk, which arithmetic does not show."""

WORTH = 0.05
"""Share of a run's arithmetic that must be saved; less drowns in what reading features takes."""

LEAST = 1e12
"""Floating-point operations that must be saved: half a minute of a CPU core. Less is not worth files that stay."""

READ = 1e9
"""Bytes per second and device that are taken to come from the disk."""

CPU_SPEED = 1e12
"""Operations per second that a CPU is taken to have where nothing is known of it: more than most have, so that reading
does not look cheaper than it is."""


@dataclass(frozen=True)
class CachePlan:
    """A cache of the features of a run's images.

    Attributes:
        images: different ones, each to be computed once.
        bytes: on the disk.
        visits: images that training shows, over all epochs.
        tower: operations of the towers per image.
        read: operations that the device does while the features of an image are read.
        flops: of the whole training, towers included.
        seconds: of device time per operation, over all devices; None where it is not known.
        sharing: equal for runs that share the cache.
    """

    images: int
    bytes: int
    visits: float
    tower: int
    read: float
    flops: float
    seconds: float | None
    sharing: str

    @classmethod
    def of(
        cls,
        stored: Sequence[Layout],
        *,
        visits: float,
        tower: int,
        flops: float,
        speed: float | None = None,
        devices: int = 1,
        sharing: str = "",
    ) -> CachePlan:
        """The plan of a cache.

        Args:
            stored: how the features of each file of records lie on the disk.
            speed: operations per second of a device; None where it is not known.
        """
        return cls(
            images=sum(part.images for part in stored),
            bytes=sum(part.bytes for part in stored),
            visits=visits,
            tower=tower,
            read=stored[0].row_bytes * (speed or CPU_SPEED) / READ,
            flops=flops,
            seconds=1 / speed / devices if speed else None,
            sharing=sharing,
        )

    @property
    def tower_share(self) -> float:
        """The towers' share of the training's arithmetic."""
        return self.visits * self.tower / self.flops

    def saved(self, runs: int = 1, to_build: int | None = None) -> float:
        """Operations saved per run; below 0 where it costs more than it saves.

        Args:
            runs: that share the cache, and the cost of building it.
            to_build: images that are not there yet; None is all of them.
        """
        to_build = self.images if to_build is None else to_build
        return self.visits * (self.tower - self.read) - to_build * (self.tower + self.read) / runs

    def ratio(self, runs: int = 1, to_build: int | None = None) -> float:
        """Time of a run with the cache, as a share of the time without it, by the arithmetic."""
        return 1 - self.saved(runs, to_build) / self.flops

    def hours(self, runs: int = 1, to_build: int | None = None) -> float | None:
        """Hours saved per run; None where the speed of the device is not known."""
        return None if self.seconds is None else self.saved(runs, to_build) * self.seconds / 3600

    def pays(self, runs: int = 1, to_build: int | None = None) -> bool:
        """Whether `trainer.feature_cache=auto` uses a cache."""
        to_build = self.images if to_build is None else to_build
        saved = self.saved(runs, to_build)
        return self.visits * runs >= MARGIN * to_build and saved >= max(WORTH * self.flops, LEAST)


def compute_of(setup: Setup) -> str:
    """How the towers of a run compute, one of `features.COMPUTE`."""
    return "bfloat16" if setup.half else "autocast" if setup.autocast else "float32"


def layouts(images: tuple[int, ...], projector: Projector, compute: str) -> list[Layout]:
    """How the features lie on the disk.

    Args:
        images: different ones of each file of records.
    """
    tokens = math.prod(projector.compressed_grid)
    return [Layout(count, tokens, projector.in_dim, COMPUTE[compute]) for count in images]
