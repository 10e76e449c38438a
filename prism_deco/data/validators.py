"""What can be wrong with a record or an image, and how it is recognised."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from PIL import Image

from prism_deco.data.examples import Encoder
from prism_deco.data.images import ImageSource, decoding_problem, open_bytes
from prism_deco.data.llava_json import Record
from prism_deco.errors import UsageError
from prism_deco.llms.encoding import IGNORE

KINDS: Mapping[str, str] = {
    "malformed": "an entry or a turn without the fields of LLaVA's format",
    "turn_order": "turns that do not alternate, or end without an answer",
    "image_tags": "more <image> tags than images, or images without a tag",
    "outside_root": "an image path that is absolute or climbs with `..`",
    "duplicate_id": "the id of an earlier record",
    "empty_turn": "a turn without text",
    "control_token": "text that the tokenizer takes for one of its special tokens",
    "unrenderable": "a conversation that the chat format cannot render, or that has nothing to learn from",
    "missing": "no such image file",
    "outside_link": "a link out of the image root",
    "unreadable": "an image that cannot be decoded to the end",
    "wrong_type": "an image of another type than its file name says",
    "huge": "so many pixels that Pillow suspects a decompression bomb",
}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        kind: one of `KINDS`.
        entry: position of the record in the file.
        id: the record's id.
        image: name of the image, where it is the image that is at fault.
    """

    kind: str
    entry: int
    id: str
    detail: str
    image: str | None = None


@dataclass(frozen=True)
class ImageFindings:
    """What reading an image showed.

    Attributes:
        format: of the file's content, as Pillow names it.
        digest: SHA-256 of the file; None where there is nothing to read.
        kind, detail: the fault, if there is one.
    """

    bytes: int = 0
    format: str | None = None
    digest: str | None = None
    kind: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class TextFindings:
    """What rendering a conversation showed; lengths in tokens of text.

    Attributes:
        length: before truncation.
        supervised: thereof what the loss covers.
        cut, supervised_cut: what truncation takes of both.
        faults: kinds and details.
    """

    length: int = 0
    supervised: int = 0
    cut: int = 0
    supervised_cut: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)


def inspect_image(images: ImageSource, name: str) -> ImageFindings:
    """Reads and decodes an image."""
    if not images.contains(name):
        return ImageFindings(kind="outside_link", detail=f"{images.location(name)} is a link out of {images}.")
    try:
        data = images.read(name)
    except FileNotFoundError:
        return ImageFindings(kind="missing", detail=f"{images.location(name)} does not exist.")
    except OSError as error:
        return ImageFindings(kind="unreadable", detail=f"{images.location(name)} cannot be read ({error}).")
    found = ImageFindings(bytes=len(data), digest=hashlib.sha256(data).hexdigest())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_bytes(data) as image:
                found = replace(found, format=image.format)
                image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return replace(found, kind="huge", detail=f"{images.location(name)}: {error}")
    except Exception as error:  # decoders raise whatever a broken file leads them into
        detail = f"{images.location(name)} cannot be decoded as an image ({decoding_problem(error)})."
        return replace(found, kind="unreadable", detail=detail)
    expected = _format_of(name)
    if expected is not None and expected != _common_name(found.format):
        detail = f"{images.location(name)} holds a {found.format} image."
        return replace(found, kind="wrong_type", detail=detail)
    return found


def _format_of(name: str) -> str | None:
    """The format that a file name stands for; None where it stands for none."""
    Image.init()
    return _common_name(Image.registered_extensions().get(PurePosixPath(name).suffix.lower()))


def _common_name(image_format: str | None) -> str | None:
    # Some cameras put a preview behind the picture, which makes the JPEG file an MPO file.
    return "JPEG" if image_format == "MPO" else image_format


class TextInspector:
    """Renders and tokenises conversations as training does."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        special = {i: token.content for i, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = set(special)
        self._special = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))) or r"(?!)")

    def __call__(self, record: Record) -> TextFindings:
        faults = list(self._simple_faults(record))
        try:
            full = self._encoder.encode(record)
            kept, cut = self._encoder.fit(full)
            faults += self._control_tokens(record, full.input_ids)
        except UsageError as error:
            return TextFindings(faults=[*faults, ("unrenderable", str(error))])
        supervised, remaining = (sum(label != IGNORE for label in e.labels) for e in (full, kept))
        return TextFindings(len(full.input_ids), supervised, cut, supervised - remaining, faults)

    def _simple_faults(self, record: Record) -> Iterator[tuple[str, str]]:
        empty = [str(i) for i, message in enumerate(record.messages, start=1) if not message["content"].strip()]
        if empty:
            yield "empty_turn", f"Turn {', '.join(empty)} of {len(record.messages)} has no text."

    def _control_tokens(self, record: Record, ids: list[int]) -> Iterator[tuple[str, str]]:
        found = {match for message in record.messages for match in self._special.findall(message["content"])}
        if not found:
            return
        # The same conversation with these words broken up: are there fewer special tokens now?
        messages = [m | {"content": self._special.sub(_broken, m["content"])} for m in record.messages]
        harmless = self._encoder.encode(replace(record, messages=messages)).input_ids
        if self._count(ids) > self._count(harmless):
            yield "control_token", f"The text holds {', '.join(sorted(found))}."

    def _count(self, ids: list[int]) -> int:
        return sum(i in self._special_ids for i in ids)


def _broken(match: re.Match[str]) -> str:
    return f"{match[0][0]} {match[0][1:]}"
