"""Records -> examples: tokens and pixels of one conversation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from prism_deco.config.registry import unknown
from prism_deco.config.schema import ON_BAD_IMAGE
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
        filler: nothing is learned from it, and it counts for nothing (`samplers.Filler`).
    """

    id: str
    encoded: Encoded
    pixels: list[dict[str, Tensor]]
    tokens_cut: int
    bad_images: int
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
        """All tokens of the record."""
        segments = self._format.render(record.messages, len(record.images))
        return encode_segments(segments, self.tokenizer, self._tokenize)

    def fit(self, encoded: Encoded) -> tuple[Encoded, int]:
        """What there is room for, and the number of tokens cut."""
        encoded, cut = truncate(encoded, self._room(len(encoded.image_slots)))
        if all(label == IGNORE for label in encoded.labels):
            raise UsageError("No token is supervised: there is nothing to learn from it.")
        return encoded, cut

    @property
    def fingerprint(self) -> str:
        """Equal for encoders that make the same tokens of the same records."""
        settings = (self._format, self._tokenize, self._max_text_tokens, self._max_positions, self._tokens_per_image)
        tokenizer = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]  # a fast tokenizer
        return hashlib.sha256(f"{settings}{tokenizer}".encode()).hexdigest()

    def _room(self, images: int) -> int:
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
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise unknown("data.on_bad_image", on_bad_image, ON_BAD_IMAGE)
        self.records = records
        self.images: ImageSource = ImageFolder(images) if isinstance(images, Path) else images
        self._encode = Encoder(
            llm, max_text_tokens=max_text_tokens, max_positions=max_positions, tokens_per_image=tokens_per_image
        )
        self.transform = transform
        self._on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | Filler) -> Example:
        if isinstance(item, Filler):
            example = self[item.index]
            return replace(example, encoded=_ignore(example.encoded), tokens_cut=0, bad_images=0, filler=True)
        record = self.records[item]
        try:
            encoded, cut = self._encode(record)
        except UsageError as error:
            raise UsageError(f"Record {record.id}: {error}") from error
        images = [self.read_image(record.id, name) for name in record.images]
        bad = sum(is_bad for _, is_bad in images)
        if bad and self._on_bad_image == "skip":
            encoded = _ignore(encoded)
        return Example(record.id, encoded, [pixels for pixels, _ in images], cut, bad)

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


def _ignore(encoded: Encoded) -> Encoded:
    return replace(encoded, labels=[IGNORE] * len(encoded.labels))
