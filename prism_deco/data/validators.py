"""The kinds of faults in records and images, and their detection."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from prism_deco.data.base import Record
from prism_deco.data.encoder import Encoder
from prism_deco.data.images import ImageSource, decoding_problem, open_bytes
from prism_deco.errors import UsageError
from prism_deco.llms.encoding import IGNORE
from prism_deco.llms.prompts import IMAGE_TAG

KINDS: Mapping[str, str] = {
    "malformed": "an entry or a turn without the fields of LLaVA's format",
    "turn_order": "turns that do not alternate, or a last question without an answer",
    "image_tags": "more <image> tags than images, several images without a tag each, or a tag in an answer",
    "outside_root": "an image path that leads out of the image root",
    "unread_image": "an image under another key than `image` or `images`",
    "broken_text": "half of a surrogate pair, which is not text",
    "id_type": "an id that is not text; training uses its text form",
    "duplicate_id": "the id of an earlier record",
    "empty_turn": "a turn without text, or with nothing but <image>",
    "control_character": "NUL or another control character in the text",
    "control_token": "text that the tokenizer reads as one of its special tokens",
    "unrenderable": "a conversation that the chat format cannot render, or that has nothing to learn from",
    "no_room": "more images than the LLM has positions for",
    "answers_cut": "a question so long that all answers lie beyond the length limit",
    "missing": "no such image file",
    "outside_link": "a symbolic link out of the image root",
    "unreadable": "an image that cannot be decoded completely",
    "huge": "so many pixels that Pillow suspects a decompression bomb",
    "single_pixel": "an image of one pixel",
    "transparent": "a fully transparent image; training sees its hidden colours",
    "rotated": "an EXIF orientation, which training ignores, like PRISM and LLaVA",
    "clipped": "16-bit or floating-point pixels; training sees them clipped to integers from 0 to 255",
}

# Tab, line feed and carriage return are ordinary text.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Fault:
    """One fault of one record."""

    kind: str  # one of `KINDS`
    entry: int  # number of the record in the file
    id: str  # of the record
    detail: str
    image: str | None = None  # name of the faulty image, if it is one


@dataclass(slots=True)
class ImageFindings:
    """The result of reading an image."""

    bytes: int = 0
    format: str | None = None  # of the content, as Pillow names it
    digest: str | None = None  # SHA-256 of the file; None if it cannot be read
    fault: tuple[str, str] | None = None  # kind and detail


@dataclass(frozen=True, slots=True)
class TextFindings:
    """The result of rendering a conversation; lengths in text tokens."""

    length: int = 0  # before truncation
    supervised: int = 0  # before truncation
    cut: int = 0  # how many of `length` are truncated
    supervised_cut: int = 0  # how many of `supervised` are truncated
    faults: list[tuple[str, str]] = field(default_factory=list)  # kinds and details


def inspect_image(images: ImageSource, name: str) -> ImageFindings:
    """Reads and decodes an image."""
    where = images.location(name)
    if not images.contains(name):
        return ImageFindings(fault=("outside_link", f"{where} is a link out of {images}."))
    try:
        data = images.read(name)
    except FileNotFoundError:
        return ImageFindings(fault=("missing", f"{where} does not exist."))
    except OSError as error:
        return ImageFindings(fault=("unreadable", f"{where} cannot be read ({error})."))
    found = ImageFindings(len(data), digest=hashlib.sha256(data).hexdigest())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_bytes(data) as image:
                found.format = image.format
                image.convert("RGB")
                if lost := _lost_in_rgb(image):
                    kind, detail = lost
                    found.fault = (kind, f"{where} {detail}")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found.fault = ("huge", f"{where}: {error}")
    except Exception as error:  # decoders raise all kinds of exceptions on broken files
        found.fault = ("unreadable", f"{where} cannot be decoded as an image ({decoding_problem(error)}).")
    return found


def _lost_in_rgb(image: Image.Image) -> tuple[str, str] | None:
    """What a decoded image loses in the conversion to 8-bit RGB, as PRISM and LLaVA train on it: kind and detail."""
    if image.size == (1, 1):
        return "single_pixel", "has one pixel."
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() == (0, 0):
        return "transparent", "is fully transparent."
    orientation = _orientation(image)
    if orientation in range(2, 9):
        return "rotated", f"has the EXIF orientation {orientation}."
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        low = pixels.min()
        high = pixels.max()
        is_fraction = image.mode == "F" and high <= 1
        if low < 0 or high > 255 or is_fraction:
            return "clipped", f"has pixels from {low:g} to {high:g} (mode {image.mode})."
    return None


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation of a decoded image. TIFF files have none left: decoding has applied it."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data, which training does not read
        return None


class TextInspector:
    """Renders and tokenises conversations as training does."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        added = encoder.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} - {IMAGE_TAG}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __call__(self, record: Record) -> TextFindings:
        faults = list(self._faults(record).items())
        room = self._encoder.room(len(record.images))
        try:
            full = self._encoder.encode(record)
            kept, cut = self._encoder.fit(full)
        except UsageError as error:
            return TextFindings(faults=[*faults, ("no_room" if room < 2 else "unrenderable", str(error))])
        if cut and all(label == IGNORE for label in full.labels[:room]):
            faults.append(("answers_cut", f"No answer begins within the limit of {room} tokens of text."))
        supervised = sum(label != IGNORE for label in full.labels)
        remaining = sum(label != IGNORE for label in kept.labels)
        return TextFindings(len(full.input_ids), supervised, cut, supervised - remaining, faults)

    def _faults(self, record: Record) -> dict[str, str]:
        """The first fault of each kind, with its detail."""
        found: dict[str, str] = {}
        for number, message in enumerate(record.messages, start=1):
            turn = f"Turn {number} of {len(record.messages)}"
            text = message["content"]
            if not text.strip():
                found.setdefault("empty_turn", f"{turn} has no text.")
            elif not text.replace(IMAGE_TAG, "").strip():
                found.setdefault("empty_turn", f"{turn} has no text but {IMAGE_TAG}.")
            if message["role"] == "assistant" and IMAGE_TAG in text:
                found.setdefault("image_tags", f"{turn} is an answer and holds {IMAGE_TAG}.")
            if control := _CONTROL.search(text):
                found.setdefault("control_character", f"{turn} holds the character U+{ord(control[0]):04X}.")
            if special := self._special.search(text):
                found.setdefault("control_token", f"{turn} holds the special token {special[0]}.")
        return found
