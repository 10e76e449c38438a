"""Entries of a LLaVA JSON list: read one at a time, and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_deco.data.images import leaves_root
from prism_deco.errors import UsageError
from prism_deco.llms.prompts import IMAGE_TAG

ROLES = {"human": "user", "gpt": "assistant"}

_CHUNK = 1 << 20  # characters


@dataclass(frozen=True)
class Record:
    """One conversation: its id, the names of its images, and messages
    `{"role": "user" | "assistant", "content": str}`."""

    id: str
    images: tuple[str, ...]
    messages: list[dict[str, str]]


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
        kind: malformed | turn_order | image_tags | outside_root.
        id: the record's id, or its position where it has none.
    """

    def __init__(self, kind: str, id: str, message: str):
        super().__init__(message)
        self.kind = kind
        self.id = id


def read_json_list(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, without ever holding all of them: parsed at once, the 1 GB of
    LLaVA's instruction data would take ten times as much memory.

    Raises:
        UsageError: the file is no JSON list, or an empty one.
    """
    try:
        yield from _entries(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}). Is the download complete?") from error


def _entries(path: Path) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    size = _CHUNK
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(size).lstrip()
        if text[:1] != "[" or text[1:].lstrip()[:1] == "]":
            json.loads(text + file.read())
            raise UsageError(f"{path}: expected a non-empty JSON list of conversations.")
        at = 1
        while True:
            try:
                entry, end = decoder.raw_decode(text, _skip_spaces(text, at))
                end = _skip_spaces(text, end)
                if end == len(text):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            except json.JSONDecodeError:
                # The entry may go on behind what was read so far. Reading ever more keeps the number
                # of attempts small for an entry that is wrong, or very long.
                more = file.read(size)
                if not more:
                    raise
                text, at, size = text[at:] + more, 0, 2 * size
                continue
            yield entry
            if text[end] == "]":
                if (text[end + 1 :] + file.read()).strip():
                    raise json.JSONDecodeError("Extra data", text, end + 1)
                return
            if text[end] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            at, size = end + 1, _CHUNK


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


def parse_record(raw: Any, where: str) -> Record:
    """Checks one entry of a LLaVA JSON list.

    A leading gpt turn is skipped, as LLaVA does. `where` names the entry in errors.

    Raises:
        RecordError: it is malformed.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise RecordError("malformed", where, f"{where}: expected an object with a list `conversations`.")
    name = str(raw.get("id", where))
    where = f"{where} (id {name})"
    images = raw.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordError("malformed", name, f"{where}: `image` must be a path, or a list of paths.")
    messages = []
    for turn in raw["conversations"]:
        # An unhashable `from` cannot be looked up.
        role = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(turn.get("value"), str):
            raise RecordError(
                "malformed", name, f'{where}: a turn must be {{"from": "human" or "gpt", "value": text}}.'
            )
        messages.append({"role": ROLES[role], "content": turn["value"]})
    if messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    if not messages or [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise RecordError("turn_order", name, f"{where}: human and gpt turns must alternate and end with gpt.")
    _check_image_tags(messages, len(images), name, where)
    for image in images:
        if leaves_root(image):
            raise RecordError(
                "outside_root",
                name,
                f"{where}: the image path {image!r} leaves the image root: image paths must be relative to it.",
            )
    return Record(name, tuple(images), messages)


def _check_image_tags(messages: list[dict[str, str]], images: int, name: str, where: str) -> None:
    # A conversation about an image without any tag is common in LLaVA files: the image goes first.
    tags = sum(m["content"].count(IMAGE_TAG) for m in messages if m["role"] == "user")
    if tags > images:
        text = f"{where}: {tags} {IMAGE_TAG} tags but {images} image files: add `image`, or remove the tag."
        raise RecordError("image_tags", name, text)
    if images > 1 and tags != images:
        text = f"{where}: {images} image files but {tags} {IMAGE_TAG} tags: write one tag per image."
        raise RecordError("image_tags", name, text)
