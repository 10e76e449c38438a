"""LLaVA's JSON: reads its entries one at a time, and parses each into a `Record`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from prism_deco.data.base import Record, RecordError
from prism_deco.data.images import path_below
from prism_deco.errors import UsageError
from prism_deco.llms.prompts import IMAGE_TAG

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

_CHUNK = 1 << 20  # characters
_IMAGE = r"(input[_-]?)?(image|img|pic|picture|photo|video|frame|media|visual|pixel_value|jpe?g|png|webp)s?([_-]?\d+)?"
_DETAIL = r"[_-]?(path|file|file_?name|name|url|uri|list|data|bytes|base_?64|b64)s?([_-]?\d+)?"
_IMAGE_KEY = re.compile(_IMAGE, re.IGNORECASE)
"""Keys under which other formats store images."""

_IMAGE_DETAIL_KEY = re.compile(f"{_IMAGE}({_DETAIL})?", re.IGNORECASE)
"""The same, and keys such as `image_url`: next to an image they describe it, alone they refer to one."""


def read_entries(path: Path) -> Iterator[Any]:
    """Yields the entries of a JSON list, or of JSON Lines, one at a time: parsed at once, LLaVA's 1 GB of instruction
    data would take ten times as much memory.
    """
    found = False
    with path.open(encoding="utf-8-sig") as file:
        try:
            if _next_character(file) == "[":
                entries = _list_entries(file)
            else:
                file.seek(0)
                entries = _line_entries(file)
            for entry in entries:
                found = True
                yield entry
        except UsageError:
            raise
        # ValueError: not JSON, not UTF-8, a number of thousands of digits; RecursionError: deeply nested brackets.
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not valid JSON ({error}). Is the download complete?") from error
    if not found:
        raise UsageError(f"{path}: expected a non-empty JSON list of conversations, or JSON Lines, one on each line.")


def _list_entries(file: TextIO) -> Iterator[Any]:
    """The entries of a list whose opening bracket has been read."""
    decoder = json.JSONDecoder()
    text = _next_character(file)
    if text == "]":
        return
    at = 0
    size = _CHUNK
    while True:
        try:
            entry, end = decoder.raw_decode(text, _skip_spaces(text, at))
            end = _skip_spaces(text, end)
            if end == len(text):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError:
            # The entry may continue in the next chunk. Doubling the chunk bounds the number of attempts for an entry
            # that is invalid, or very long.
            more = file.read(size)
            if not more:
                raise
            text = text[at:] + more
            at = 0
            size *= 2
            continue
        yield entry
        if text[end] == "]":
            if (text[end + 1 :] + file.read()).strip():
                raise json.JSONDecodeError("Extra data", text, end + 1)
            return
        if text[end] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        at = end + 1
        size = _CHUNK


def _line_entries(file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if line.endswith("\n") and not line[error.pos :].strip():  # it continues in the next line
                raise UsageError(
                    f"{file.name}: the object of line {number} has several lines. Write a list of the objects, "
                    "[{...}, {...}], or each object on a line of its own (JSON Lines)."
                ) from error
            raise ValueError(f"line {number}, column {error.pos + 1}: {error.msg}") from error
        yield entry


def _next_character(file: TextIO) -> str:
    """The next character that is not whitespace; empty at the end of the file."""
    character = file.read(1)
    while character.isspace():
        character = file.read(1)
    return character


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


def record_id(raw: Any, position: int) -> str:
    """The id of an entry, or `record POSITION` if it has none."""
    has_id = isinstance(raw, dict) and raw.get("id") is not None
    name = str(raw["id"]) if has_id else f"record {position}"
    return name.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be logged


def parse_record(raw: Any, id: str, image_root: Path | None) -> tuple[Record, dict[str, str]]:
    """Checks one entry; `RecordError` if it cannot be trained on.

    A leading gpt turn is skipped, as LLaVA does. A leading system turn is kept; like the text that a chat format puts
    before the first question, it belongs to the first round (`llms.prompts.Segment`).

    Args:
        id: see `record_id`.
        image_root: absolute image paths below this folder become relative to it; None refuses them.

    Returns:
        The record, and its oddities by kind (turn_order, image_tags): probable mistakes that can still be trained on
        (`recipe.odd_records`).
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise RecordError("malformed", "expected an object with a list `conversations`, `messages` or `texts`.")
    images = _images(raw, image_root)
    messages = _messages(raw["conversations"])
    oddities = {}
    if messages[-1]["role"] == "user":
        oddities["turn_order"] = "the last human turn has no answer."
    # A conversation about one image without a tag is common in LLaVA files: the image goes first.
    tags = sum(m["content"].count(IMAGE_TAG) for m in messages if m["role"] == "user")
    if len(images) > 1 and tags != len(images):
        raise RecordError("image_tags", f"{len(images)} image files but {tags} {IMAGE_TAG} tags: write one per image.")
    if tags > len(images):
        detail = f"{tags} {IMAGE_TAG} tags but {len(images)} image files: add `image`, or remove the tag."
        oddities["image_tags"] = detail
    return Record(id, tuple(images), messages), oddities


def _images(raw: dict[str, Any], image_root: Path | None) -> list[str]:
    images = raw.get("image")
    if images is None:
        images = []
    elif isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordError(
            "malformed", "`image` must be a path, or a list of paths (in Parquet and Arrow files: encoded images)."
        )
    unread = _unread_image_key({key: value for key, value in raw.items() if key != "image"}, images)
    if unread is not None:
        raise RecordError("unread_image", f"the key `{unread}` is not read: images stand under `image` or `images`.")
    for number, turn in enumerate(raw["conversations"], start=1):
        unread = _unread_image_key(turn, images) if isinstance(turn, dict) else None
        if unread is not None:
            place = "images stand under the record's own `image` or `images`"
            raise RecordError("unread_image", f"the key `{unread}` of turn {number} is not read: {place}.")
    inside = []
    for image in images:
        _check_text(image, "`image`")
        if "\0" in image:
            raise RecordError("malformed", "`image` holds a NUL character.")
        try:
            inside.append(path_below(image_root, image))
        except UsageError as error:
            raise RecordError("outside_root", str(error)) from error
    return inside


def is_image_key(key: str) -> bool:
    """Whether a key such as `image` or `image_url` may hold images or their paths."""
    return _IMAGE_DETAIL_KEY.fullmatch(key) is not None


def _unread_image_key(fields: Mapping[str, Any], images: Sequence[str]) -> str | None:
    """The first key of a record or a turn that holds images which are not read; None if there is none.

    Args:
        fields: the record or turn, without the key whose images are read.
        images: the images that are read; another key may repeat them.
    """
    pattern = _IMAGE_DETAIL_KEY if not images else _IMAGE_KEY
    for key, value in fields.items():
        if pattern.fullmatch(key) and _is_filled(value) and list(images) not in (value, [value]):
            return key
    return None


def _is_filled(value: Any) -> bool:
    """Whether a value may be an image: text, bytes, or a list or mapping with some, or a list of numbers."""
    if isinstance(value, dict):
        return any(map(_is_filled, value.values()))
    if isinstance(value, list):
        return any(map(_is_filled, value)) or any(isinstance(entry, int | float) for entry in value)
    return isinstance(value, str | bytes) and bool(value)


def _messages(turns: list[Any]) -> list[dict[str, str]]:
    messages = []
    for number, turn in enumerate(turns, start=1):
        # `from` may be unhashable, for which `in ROLES` would raise.
        role = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(turn.get("value"), str):
            what = f"is from {role!r}" if isinstance(role, str) and role not in ROLES else "cannot be read"
            raise RecordError(
                "malformed",
                f'turn {number} {what}: a turn must be {{"from": "human" or "gpt", "value": text}} or {{"role": "user" '
                'or "assistant", "content": text}; the first one may be from "system".',
            )
        if role == "system" and (number > 1 or IMAGE_TAG in turn["value"]):
            problem = f"holds {IMAGE_TAG}" if number == 1 else "is not the first"
            raise RecordError("malformed", f"turn {number} is from 'system' and {problem}: move it, or leave it out.")
        _check_text(turn["value"], f"turn {number}")
        messages.append({"role": ROLES[role], "content": turn["value"]})
    system = [message for message in messages[:1] if message["role"] == "system"]
    messages = messages[len(system) :]
    if messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    roles = [message["role"] for message in messages]
    alternating = ["user", "assistant"] * len(roles)
    if len(roles) < 2 or roles != alternating[: len(roles)]:
        raise RecordError("turn_order", "human and gpt turns must alternate, and at least one question be answered.")
    return system + messages


def _check_text(text: str, place: str) -> None:
    """Refuses lone surrogates, which JSON can escape but no tokenizer or file system accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("ascii", "backslashreplace").decode()
        raise RecordError("broken_text", f"{place} holds half of a surrogate pair ({half}).") from error
