"""Records -> examples (tokens and pixels of one conversation) -> the batches of one optimizer step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prism_deco.data.encoder import Encoder
from prism_deco.data.images import ImageFolder, ImageSource, load_image
from prism_deco.data.records import Records
from prism_deco.data.samplers import Filler, Share, StepSampler
from prism_deco.errors import UsageError
from prism_deco.llms import Encoded
from prism_deco.llms.encoding import IGNORE
from prism_deco.machine import cores
from prism_deco.sequence import Batch, build_batch

log = logging.getLogger(__name__)

MOST_WORKERS = 8
"""The most workers per rank by default. Each prefetches two optimizer steps."""

Transform = Callable[[Image.Image], dict[str, Tensor]]


@dataclass(frozen=True)
class Example:
    """One record, ready for the model.

    Attributes:
        pixels: per image a dict tower -> float[3, S, S].
        tokens_cut: text tokens removed by truncation.
        bad_images: number of images that could not be read and were handled according to `on_bad_image`.
        bad_record: it was skipped, or LLaVA ignores such records; it has no labels.
        row: the record's index in `Examples`.
        filler: it has no labels and is not counted (`samplers.Filler`).
    """

    id: str
    encoded: Encoded
    pixels: list[dict[str, Tensor]]
    tokens_cut: int
    bad_images: int
    bad_record: bool = False
    row: int = -1
    filler: bool = False


class Examples(Dataset[Example]):
    """Tokenises conversations and decodes their images.

    A skipped record stays in its batch without labels, since all ranks must run the same number of forward passes.

    Args:
        images: the source of the records' images; a path is a folder of image files.
        on_bad_image: fail | skip (the record) | blank (an image of the towers' mean colour).
        on_bad_record: fail | skip, for a record that cannot be encoded.
    """

    def __init__(
        self,
        records: Records,
        images: ImageSource | Path,
        encoder: Encoder,
        transform: Transform,
        *,
        on_bad_image: str = "fail",
        on_bad_record: str = "fail",
    ):
        self.records = records
        self.images = ImageFolder(images) if isinstance(images, Path) else images
        self.encoder = encoder
        self.transform = transform
        self._on_bad_image = on_bad_image
        self._on_bad_record = on_bad_record

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | Filler) -> Example:
        if isinstance(item, Filler):
            example = self[item.index]
            encoded = _ignore(example.encoded)
            return replace(example, encoded=encoded, tokens_cut=0, bad_images=0, bad_record=False, filler=True)
        record = self.records[item]
        try:
            encoded, cut = self.encoder(record)
        except UsageError as error:
            if self._on_bad_record == "fail":
                raise
            log.warning("%s", error)
            placeholder = self.encoder.placeholder()
            return Example(record.id, placeholder, [], tokens_cut=0, bad_images=0, bad_record=True, row=item)
        ignored = self.encoder.ignores(record)
        images = [self.read_image(record.id, name) for name in record.images]
        bad_images = sum(is_bad for _, is_bad in images)
        if ignored or (bad_images and self._on_bad_image == "skip"):
            encoded = _ignore(encoded)
        pixels = [own for own, _ in images]
        return Example(record.id, encoded, pixels, cut, bad_images, bad_record=ignored, row=item)

    def read_image(self, record: str, name: str) -> tuple[dict[str, Tensor], bool]:
        """The model's input for an image of a record, tower -> float[3, S, S], and whether the image is bad: then the
        input is blank, or for `on_bad_image="fail"` a `UsageError`."""
        try:
            image = load_image(self.images, name)
        except OSError as error:
            if self._on_bad_image == "fail":
                raise UsageError(
                    f"Record {record}: {error} Fix the file, or skip such records with data.on_bad_image=skip."
                ) from error
            log.warning("Record %s: %s (data.on_bad_image=%s)", record, error, self._on_bad_image)
            return blank_pixels(self.transform), True
        return self.transform(image), False


def blank_pixels(transform: Transform) -> dict[str, Tensor]:
    """The input that replaces an unreadable image: each tower's mean colour, which is zero after normalisation."""
    return {tower: torch.zeros_like(pixels) for tower, pixels in transform(Image.new("RGB", (8, 8))).items()}


def _ignore(encoded: Encoded) -> Encoded:
    return replace(encoded, labels=[IGNORE] * len(encoded.labels))


@dataclass
class Step:
    """What one rank computes in one optimizer step.

    Attributes:
        batches: the forward passes, at most `micro_batch_size` records each.
        records, tokens_cut, bad_images: totals over the batches.
        bad_rows: rows of the bad records.
        targets, num_targets: number of supervised tokens in each forward pass, and in the step on this rank.
        lengths: number of positions of each sequence. Counted here, on the CPU: counting on a GPU would synchronise.
    """

    batches: list[Batch]
    records: int
    tokens_cut: int
    bad_images: int
    bad_rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_targets: int = field(init=False)

    def __post_init__(self) -> None:
        self.targets = self.targets or [len(batch.targets) for batch in self.batches]
        self.num_targets = sum(self.targets)
        if not self.lengths:
            rows = (batch.lengths or batch.attention_mask.sum(dim=1).tolist() for batch in self.batches)
            self.lengths = list(chain.from_iterable(rows))

    def pin_memory(self) -> Step:
        """The same step in page-locked memory (the DataLoader calls this)."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


@dataclass(frozen=True)
class Collate:
    """Builds the batches of one optimizer step from its examples.

    Attributes:
        tokens_per_image: visual tokens M of the projector.
        micro_batch_size: records per forward pass.
        restart_rounds, pack: see `build_batch`.
        coarser: smaller numbers of visual tokens; every forward pass is repeated with each of them.
    """

    tokens_per_image: int
    micro_batch_size: int
    restart_rounds: bool = False
    pack: bool = False
    coarser: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Example]) -> Step:
        size = self.micro_batch_size
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        return Step(
            batches=[self.batch(part, scale) for part in parts for scale in (self.tokens_per_image, *self.coarser)],
            records=sum(not e.filler for e in examples),
            tokens_cut=sum(e.tokens_cut for e in examples),
            bad_images=sum(e.bad_images for e in examples),
            bad_rows=[e.row for e in examples if e.bad_record],
        )

    def batch(self, examples: Sequence[Example], tokens_per_image: int | None = None) -> Batch:
        """The forward pass of some examples, with `self.tokens_per_image` visual tokens by default."""
        return build_batch(
            [e.encoded for e in examples],
            tokens_per_image or self.tokens_per_image,
            pixels=stack_pixels([p for e in examples for p in e.pixels]),
            restart_rounds=self.restart_rounds,
            pack=self.pack,
            ids=[e.id for e in examples],
        )


def stack_pixels(pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Stacks I images, tower -> float[3, S, S] each, to tower -> float[I, 3, S, S]; None if there are none."""
    if not pixels:
        return None
    return {tower: torch.stack([p[tower] for p in pixels]) for tower in pixels[0]}


def loader_workers(asked: int | None, *, gpu: bool, ranks: int) -> int:
    """Loader workers per rank: the number asked for; by default none on a CPU, and one per core of the rank on GPUs.

    Args:
        ranks: processes on this node, which share its cores unless SLURM assigns each its own.
    """
    if asked is not None or not gpu:
        return asked or 0
    return min(MOST_WORKERS, max(1, int(os.environ.get("SLURM_CPUS_PER_TASK", cores() // ranks))))


def build_loader(
    examples: Examples, collate: Collate, sampler: StepSampler | Sequence[Share], *, num_workers: int
) -> DataLoader[Step]:
    """A loader that yields whole optimizer steps of this rank."""
    return DataLoader(
        examples,
        batch_sampler=sampler,  # type: ignore[arg-type]  # any iterable of lists
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
