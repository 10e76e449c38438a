"""Examples -> the batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from prism_deco.data.examples import Example, Examples
from prism_deco.data.samplers import Share, StepSampler
from prism_deco.sequence import Batch, build_batch


@dataclass
class Step:
    """What one rank computes in one optimizer step.

    Attributes:
        batches: the forward passes, at most `micro_batch_size` records each.
        records, tokens_cut, bad_images: totals over the batches.
        bad_rows: the bad records, by their numbers.
    """

    batches: list[Batch]
    records: int
    tokens_cut: int
    bad_images: int
    bad_rows: list[int] = field(default_factory=list)

    @property
    def num_targets(self) -> int:
        """Supervised tokens of the step on this rank."""
        return sum(batch.num_targets for batch in self.batches)

    def pin_memory(self) -> Step:
        """The same step in page-locked memory (the DataLoader calls this)."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


@dataclass(frozen=True)
class Collate:
    """Makes the batches of one optimizer step out of its examples.

    Attributes:
        tokens_per_image: visual tokens M of the projector.
        micro_batch_size: records per forward pass.
        restart_rounds, pack: see `build_batch`.
    """

    tokens_per_image: int
    micro_batch_size: int
    restart_rounds: bool = False
    pack: bool = False

    def __call__(self, examples: Sequence[Example]) -> Step:
        size = self.micro_batch_size
        return Step(
            batches=[self.batch(examples[i : i + size]) for i in range(0, len(examples), size)],
            records=sum(not e.filler for e in examples),
            tokens_cut=sum(e.tokens_cut for e in examples),
            bad_images=sum(e.bad_images for e in examples),
            bad_rows=[e.row for e in examples if e.bad_record],
        )

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The forward pass of some examples."""
        return build_batch(
            [e.encoded for e in examples],
            self.tokens_per_image,
            pixels=stack_pixels([p for e in examples for p in e.pixels]),
            restart_rounds=self.restart_rounds,
            pack=self.pack,
            ids=[e.id for e in examples],
        )


def stack_pixels(pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Images as dicts tower -> float[3, S, S] -> one dict tower -> float[I, 3, S, S]; None for no image."""
    if not pixels:
        return None
    return {tower: torch.stack([p[tower] for p in pixels]) for tower in pixels[0]}


def build_loader(
    examples: Examples, collate: Collate, sampler: StepSampler | Sequence[Share], *, num_workers: int
) -> DataLoader[Step]:
    """A loader whose items are whole optimizer steps of this rank."""
    return DataLoader(
        examples,
        batch_sampler=sampler,  # type: ignore[arg-type]  # any iterable of lists
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
