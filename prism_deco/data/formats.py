"""Published formats of conversations, rewritten as entries of LLaVA's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prism_deco.data.base import RecordError
from prism_deco.llms.prompts import IMAGE_TAG

_SPEAKERS = {"user": "human", "assistant": "gpt"}


def as_llava(raw: Any) -> Any:
    """Rewrites an entry as LLaVA's {id, image, conversations}.

    Supported formats, each with its images under `image` or `images`:
    - `conversations` of {from, value} (LLaVA, ShareGPT);
    - `messages` of {role, content} (transformers' chat templates, TRL, LLaMA-Factory), where a content is text, or a
      list of parts {"type": "text", "text"} and {"type": "image"};
    - `texts` of {user, assistant} (The Cauldron, FineVision), whose images come before the first question.

    Anything else is returned unchanged; `parse_record` then says what is wrong with it.

    Raises:
        RecordError: a part of a message is neither text nor an image, or there are images in two places.
    """
    if not isinstance(raw, dict):
        return raw
    entry = dict(raw)
    if not entry.get("image") and entry.get("images"):
        entry["image"] = entry.pop("images")
    if entry.get("conversations") is not None:
        return entry
    if isinstance(entry.get("messages"), list):
        shown: list[Any] = []
        turns = [_turn(message, shown) for message in entry.pop("messages")]
        if shown and entry.get("image") not in (None, [], shown):
            raise RecordError("unread_image", "images stand both in the record and in the parts of its messages.")
        return entry | {"conversations": turns} | ({"image": shown} if shown else {})
    if isinstance(entry.get("texts"), list):
        return entry | {"conversations": _rounds(entry.pop("texts"), entry.get("image"))}
    return entry


def _turn(message: Any, shown: list[Any]) -> Any:
    """Rewrites a message as a turn, and appends the images of its parts to `shown`."""
    if not isinstance(message, Mapping):
        return message
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, shown) for part in content)
    speaker = _SPEAKERS.get(role, role) if isinstance(role, str) else role
    return others | {"from": speaker, "value": content}


def _part(part: Any, shown: list[Any]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        if part.get("image"):
            shown.append(part["image"])
        return f"{IMAGE_TAG}\n"
    raise RecordError("malformed", f"a message has a part of type {kind!r}: only text and images are read.")


def _rounds(texts: list[Any], images: Any) -> list[Any]:
    turns = []
    for text in texts:
        if not isinstance(text, Mapping):
            return [text]
        others = {key: value for key, value in text.items() if key not in ("user", "assistant")}
        turns.append(others | {"from": "human", "value": text.get("user")})
        turns.append({"from": "gpt", "value": text.get("assistant")})
    # A single image goes first even without a tag; several need one each.
    tagged = any(IMAGE_TAG in str(turn["value"]) for turn in turns)
    if turns and isinstance(images, list) and len(images) > 1 and not tagged:
        turns[0]["value"] = f"{IMAGE_TAG * len(images)}\n{turns[0]['value']}"
    return turns
