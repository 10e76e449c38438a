"""Records -> examples: tokens and pixels of one conversation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from prism_deco.config.registry import unknown
from prism_deco.config.schema import ON_BAD_IMAGE, ON_BAD_RECORD
from prism_deco.data.images import ImageFolder, ImageSource, load_image
from prism_deco.data.records import Record, Records
from prism_deco.data.samplers import Filler
from prism_deco.data.split import Subset
from prism_deco.errors import UsageError
from prism_deco.llms import Encoded, LanguageModel, truncate
from prism_deco.llms.encoding import IGNORE, encode_segments

log = logging.getLogger(__name__)

Transform = Callable[[Image.Image], dict[str, Tensor]]


@dataclass(frozen=True)
class Example:
    """One record, ready for the model.

    Attributes:
        pixels: per image a dict tower -> float[3, S, S].
        tokens_cut: text tokens that truncation removed.
        bad_images: images that could not be read and were handled by `on_bad_image`.
        bad_record: there is nothing to learn from it; `on_bad_record` is "skip", or LLaVA ignores such a record.
        filler: nothing is learned from it, and it counts for nothing (`samplers.Filler`).
    """

    id: str
    encoded: Encoded
    pixels: list[dict[str, Tensor]]
    tokens_cut: int
    bad_images: int
    bad_record: bool = False
    filler: bool = False


class Encoder:
    """Conversation -> tokens within the room there is.

    Holds the tokenizer and the chat format but not the model, which loader processes have no use for.

    Args:
        max_text_tokens: text is cut to this many tokens (images never are).
        max_positions: longest sequence of the LLM, visual tokens included; None knows no limit.
        tokens_per_image: visual tokens M of one image.
    """

    def __init__(
        self, llm: LanguageModel, *, max_text_tokens: int, max_positions: int | None = None, tokens_per_image: int = 0
    ):
        self.tokenizer = llm.tokenizer
        self._format = llm.prompt_format
        self._tokenize = llm.spec.tokenize
        self._max_text_tokens = max_text_tokens
        self._max_positions = max_positions
        self._tokens_per_image = tokens_per_image

    def __call__(self, record: Record) -> tuple[Encoded, int]:
        """The record's tokens, and how many more there were before the cut.

        Raises:
            UsageError: it cannot be rendered, leaves no room for text, or has nothing to learn from.
        """
        return self.fit(self.encode(record))

    def encode(self, record: Record) -> Encoded:
        """All tokens of the record. A last question without an answer is left out: it has no loss, and nothing follows
        it."""
        segments = self._format.render(record.answered, len(record.images))
        return encode_segments(segments, self.tokenizer, self._tokenize)

    def fit(self, encoded: Encoded) -> tuple[Encoded, int]:
        """What there is room for, and the number of tokens cut."""
        images = len(encoded.image_slots)
        room = self.room(images)
        if room < 2:
            raise UsageError(
                f"{images} images of {self._tokens_per_image} visual tokens leave no room for a question and an answer "
                f"in {self._max_positions} positions."
            )
        encoded, cut = truncate(encoded, room)
        if all(label == IGNORE for label in encoded.labels):
            raise UsageError("No token is supervised: there is nothing to learn from it.")
        return encoded, cut

    def ignores(self, record: Record) -> bool:
        """Whether nothing is learned from a record by the rules of the format: LLaVA's labels do not add up where the
        last question has no answer, and it then ignores the whole record."""
        return len(record.answered) < len(record.messages) and self._format.image_slot == "in_place"

    def placeholder(self) -> Encoded:
        """Stands for a record that cannot be encoded; nothing is learned from it."""
        token = cast(int, self.tokenizer.eos_token_id)
        return Encoded(input_ids=[token, token], labels=[IGNORE, IGNORE], rounds=[0, 0], image_slots=[])

    @property
    def fingerprint(self) -> str:
        """Equal for encoders that make the same tokens of the same records."""
        settings = (self._format, self._tokenize, self._max_text_tokens, self._max_positions, self._tokens_per_image)
        tokenizer = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]  # a fast tokenizer
        return hashlib.sha256(f"{settings}{tokenizer}".encode()).hexdigest()

    def room(self, images: int) -> int:
        """Tokens of text beside so many images."""
        if self._max_positions is None:
            return self._max_text_tokens
        return min(self._max_text_tokens, self._max_positions - self._tokens_per_image * images)


class Examples(Dataset[Example]):
    """Tokenises conversations and decodes their images.

    Args:
        images: where the records' images are; a path is a folder of files.
        max_text_tokens, max_positions, tokens_per_image: see `Encoder`.
        on_bad_image: fail | skip (the record stays in place but is not learned from, so that all
            ranks keep in step) | blank (an image of the towers' mean colour).
        on_bad_record: fail | skip, for a record that cannot be encoded; it stays in place, too.
    """

    def __init__(
        self,
        records: Records | Subset,
        images: ImageSource | Path,
        llm: LanguageModel,
        transform: Transform,
        *,
        max_text_tokens: int,
        max_positions: int | None = None,
        tokens_per_image: int = 0,
        on_bad_image: str = "fail",
        on_bad_record: str = "fail",
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise unknown("data.on_bad_image", on_bad_image, ON_BAD_IMAGE)
        if on_bad_record not in ON_BAD_RECORD:
            raise unknown("data.on_bad_record", on_bad_record, ON_BAD_RECORD)
        self.records = records
        self.images: ImageSource = ImageFolder(images) if isinstance(images, Path) else images
        self.encoder = Encoder(
            llm, max_text_tokens=max_text_tokens, max_positions=max_positions, tokens_per_image=tokens_per_image
        )
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
                raise _refusal(record, error) from error
            log.warning("Record %s: %s (data.on_bad_record=skip)", record.id, error)
            return Example(record.id, self.encoder.placeholder(), [], tokens_cut=0, bad_images=0, bad_record=True)
        ignored = self.encoder.ignores(record)
        images = [self.read_image(record.id, name) for name in record.images]
        bad_images = sum(is_bad for _, is_bad in images)
        if ignored or (bad_images and self._on_bad_image == "skip"):
            encoded = _ignore(encoded)
        return Example(record.id, encoded, [pixels for pixels, _ in images], cut, bad_images, bad_record=ignored)

    def read_image(self, record: str, name: str) -> tuple[dict[str, Tensor], bool]:
        """What the model is given of an image of a record, and whether the image is bad."""
        image = self.open_image(record, name)
        return (self.transform(image), False) if image is not None else (blank_pixels(self.transform), True)

    def open_image(self, record: str, name: str) -> Image.Image | None:
        """An image of a record; None if it cannot be read and `on_bad_image` allows that, else `OSError`."""
        try:
            return load_image(self.images, name)
        except OSError as error:
            if self._on_bad_image == "fail":
                raise OSError(
                    f"Record {record}: {error} Mend the file, or go on without it: data.on_bad_image=skip"
                ) from error
            log.warning("Record %s: %s (data.on_bad_image=%s)", record, error, self._on_bad_image)
            return None


def blank_pixels(transform: Transform) -> dict[str, Tensor]:
    """The input for an image that cannot be read: each tower's mean colour, which its normalisation maps to zero."""
    return {tower: torch.zeros_like(pixels) for tower, pixels in transform(Image.new("RGB", (8, 8))).items()}


def check_records(records: Records | Subset, encoder: Encoder) -> None:
    """Encodes the records that the index tells may be refused, those with many images and odd ones, so that none of
    them stops a run hours later.

    Raises:
        UsageError: names the first that cannot be encoded.
    """
    counts = np.unique(records.num_images)
    crowded = [count for count in counts.tolist() if encoder.room(count) < 2]
    suspects = records.odd | np.isin(records.num_images, crowded)
    for row in np.flatnonzero(suspects).tolist():
        record = records[row]
        try:
            encoder(record)
        except UsageError as error:
            raise _refusal(record, error) from error


def _refusal(record: Record, error: UsageError) -> UsageError:
    return UsageError(f"Record {record.id}: {error} Fix it, or skip such records with data.on_bad_record=skip.")


def _ignore(encoded: Encoded) -> Encoded:
    return replace(encoded, labels=[IGNORE] * len(encoded.labels))
