"""Records -> examples -> the batches of one optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prism_deco.data.images import open_image, resolve_image
from prism_deco.data.records import Records
from prism_deco.data.samplers import StepSampler
from prism_deco.llms import IGNORE, Encoded, LanguageModel, truncate
from prism_deco.registry import unknown
from prism_deco.sequence import Batch, build_batch

log = logging.getLogger(__name__)

Transform = Callable[[Image.Image], dict[str, Tensor]]
BAD_IMAGE_POLICIES = ("fail", "skip", "blank")


@dataclass(frozen=True)
class Example:
    """One record, ready for the model.

    Attributes:
        pixels: per image a dict tower -> float[3, S, S].
        tokens_cut: text tokens that truncation removed.
        bad_images: images that could not be read and were handled by `on_bad_image`.
    """

    id: str
    encoded: Encoded
    pixels: list[dict[str, Tensor]]
    tokens_cut: int
    bad_images: int


@dataclass
class Step:
    """What one rank computes in one optimizer step.

    Attributes:
        batches: the forward passes, at most `micro_batch_size` records each.
        records, tokens_cut, bad_images: totals over the batches.
    """

    batches: list[Batch]
    records: int
    tokens_cut: int
    bad_images: int

    @property
    def num_targets(self) -> int:
        """Supervised tokens of the step on this rank."""
        return sum(batch.num_targets for batch in self.batches)

    def pin_memory(self) -> Step:
        """The same step in page-locked memory (the DataLoader calls this)."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class Examples(Dataset[Example]):
    """Tokenises conversations and decodes their images.

    Args:
        max_text_tokens: text is cut to this many tokens (images never are).
        on_bad_image: fail | skip (the record stays in place but is not learned from, so that all
            ranks keep in step) | blank (an image of the towers' mean colour).
    """

    def __init__(
        self,
        records: Records,
        image_root: Path,
        llm: LanguageModel,
        transform: Transform,
        *,
        max_text_tokens: int,
        on_bad_image: str = "fail",
    ):
        if on_bad_image not in BAD_IMAGE_POLICIES:
            raise unknown("policy data.on_bad_image", on_bad_image, BAD_IMAGE_POLICIES)
        self.records = records
        self.image_root = image_root
        self._llm = llm
        self._transform = transform
        self._max_text_tokens = max_text_tokens
        self._on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        try:
            encoded = self._llm.encode(record.messages, num_images=len(record.images))
            encoded, cut = truncate(encoded, self._max_text_tokens)
        except ValueError as error:
            raise ValueError(f"Record {record.id}: {error}") from error
        images, bad = [], 0
        for name in record.images:
            try:
                images.append(open_image(resolve_image(self.image_root, name)))
            except OSError as error:
                if self._on_bad_image == "fail":
                    raise OSError(
                        f"Record {record.id}: {error} Mend the file, or go on without it: data.on_bad_image=skip"
                    ) from error
                log.warning("Record %s: %s (data.on_bad_image=%s)", record.id, error, self._on_bad_image)
                images.append(None)
                bad += 1
        if bad and self._on_bad_image == "skip":
            encoded = replace(encoded, labels=[IGNORE] * len(encoded.labels))
        pixels = [self._transform(image) if image is not None else self._blank() for image in images]
        return Example(record.id, encoded, pixels, cut, bad)

    def _blank(self) -> dict[str, Tensor]:
        # Zero is each tower's mean colour after its normalisation.
        return {k: torch.zeros_like(v) for k, v in self._transform(Image.new("RGB", (8, 8))).items()}


@dataclass(frozen=True)
class Collate:
    """Makes the batches of one optimizer step out of its examples.

    Attributes:
        tokens_per_image: visual tokens M of the projector.
        micro_batch_size: records per forward pass.
        restart_rounds: see `build_batch`.
    """

    tokens_per_image: int
    micro_batch_size: int
    restart_rounds: bool = False

    def __call__(self, examples: Sequence[Example]) -> Step:
        size = self.micro_batch_size
        return Step(
            batches=[self.batch(examples[i : i + size]) for i in range(0, len(examples), size)],
            records=len(examples),
            tokens_cut=sum(e.tokens_cut for e in examples),
            bad_images=sum(e.bad_images for e in examples),
        )

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The forward pass of some examples."""
        return build_batch(
            [e.encoded for e in examples],
            self.tokens_per_image,
            pixels=stack_pixels([p for e in examples for p in e.pixels]),
            restart_rounds=self.restart_rounds,
            ids=[e.id for e in examples],
        )


def stack_pixels(pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Images as dicts tower -> float[3, S, S] -> one dict tower -> float[I, 3, S, S]; None for no image."""
    if not pixels:
        return None
    return {tower: torch.stack([p[tower] for p in pixels]) for tower in pixels[0]}


def build_loader(
    examples: Examples, collate: Collate, sampler: StepSampler | Sequence[Sequence[int]], *, num_workers: int
) -> DataLoader[Step]:
    """A loader whose items are whole optimizer steps of this rank."""
    return DataLoader(
        examples,
        batch_sampler=sampler,  # type: ignore[arg-type]  # any iterable of index lists
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )
