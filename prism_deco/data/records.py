"""LLaVA records, checked once and then read from a memory-mapped index.

The JSON list is parsed a single time and rewritten as one line per record with an array of offsets,
so that 665 000 records cost a loader process no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

ROLES = {"human": "user", "gpt": "assistant"}
IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class Record:
    """One conversation: its id, image paths relative to the image root, and messages
    `{"role": "user" | "assistant", "content": str}`."""

    id: str
    images: tuple[str, ...]
    messages: list[dict[str, str]]


class Records(Sequence[Record]):
    """The records of one JSON file, in file order.

    Attributes:
        data_hash: SHA-256 of the JSON file, hexadecimal.
        words: int32[n], whitespace-separated words of all turns (the sampler's length).
        has_image: bool[n].
        positions: float64[n] in [0, 1), a hash of each record's first image name (of its id where it
            has none); the held-out split is a threshold on it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.data_hash: str = json.loads((folder / "index.json").read_text())["sha256"]
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.words: np.ndarray = np.load(folder / "words.npy", mmap_mode="r")
        self.has_image: np.ndarray = np.load(folder / "has_image.npy", mmap_mode="r")
        self.positions: np.ndarray = np.load(folder / "positions.npy", mmap_mode="r")
        self._lines: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._offsets[index : index + 2]
        raw = json.loads(self._open()[start:end])
        return Record(raw["id"], tuple(raw["images"]), raw["messages"])

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def _open(self) -> mmap.mmap:
        # Opened lazily: a memory map does not survive the pickling to a loader process.
        if self._lines is None:
            with (self._folder / "records.jsonl").open("rb") as file:
                self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._lines

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lines": None}


def open_records(path: Path, cache: Path) -> Records:
    """Opens a LLaVA JSON file, through its index in `cache` (built on first use).

    Raises:
        ValueError: the file is no JSON list, or a record is malformed; names the file and the record.
    """
    digest = _sha256(path)
    folder = cache / "records" / digest[:16]
    if not (folder / "index.json").is_file():
        log.info("Indexing %s", path)
        _build_index(path, digest, folder)
    return Records(folder)


def parse_record(raw: Any, where: str) -> Record:
    """Checks one entry of a LLaVA JSON list.

    A leading gpt turn is skipped, as LLaVA does. `where` names the entry in errors.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise ValueError(f"{where}: expected an object with a list `conversations`.")
    name = str(raw.get("id", where))
    images = raw.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"{where} (id {name}): `image` must be a path, or a list of paths.")
    messages = []
    for turn in raw["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f'{where} (id {name}): a turn must be {{"from": "human" or "gpt", "value": text}}.')
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    if messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    if not messages or [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise ValueError(f"{where} (id {name}): human and gpt turns must alternate and end with gpt.")
    _check_image_tags(messages, len(images), f"{where} (id {name})")
    return Record(name, tuple(images), messages)


def _check_image_tags(messages: list[dict[str, str]], images: int, where: str) -> None:
    # A conversation about an image without any tag is common in LLaVA files: the image goes first.
    tags = sum(m["content"].count(IMAGE_TAG) for m in messages if m["role"] == "user")
    if tags > images:
        raise ValueError(f"{where}: {tags} {IMAGE_TAG} tags but {images} image files: add `image`, or remove the tag.")
    if images > 1 and tags != images:
        raise ValueError(f"{where}: {images} image files but {tags} {IMAGE_TAG} tags: write one tag per image.")


def _build_index(path: Path, digest: str, folder: Path) -> None:
    try:
        entries = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Is the download complete?") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a non-empty JSON list of conversations.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        offsets = np.zeros(len(entries) + 1, dtype=np.int64)
        words = np.zeros(len(entries), dtype=np.int32)
        has_image = np.zeros(len(entries), dtype=bool)
        positions = np.zeros(len(entries))
        with (building / "records.jsonl").open("wb") as file:
            for i, raw in enumerate(entries):
                record = parse_record(raw, f"{path} record {i}")
                line = {"id": record.id, "images": record.images, "messages": record.messages}
                offsets[i + 1] = offsets[i] + file.write(json.dumps(line).encode() + b"\n")
                words[i] = sum(len(m["content"].split()) for m in record.messages)
                has_image[i] = bool(record.images)
                positions[i] = _position(record.images[0] if record.images else record.id)
        arrays = {"offsets": offsets, "words": words, "has_image": has_image, "positions": positions}
        for name, array in arrays.items():
            np.save(building / f"{name}.npy", array)
        (building / "index.json").write_text(json.dumps({"source": str(path), "sha256": digest, "records": len(words)}))
        try:
            os.replace(building, folder)
        except OSError:
            # Another process finished the same index first; its content is the same.
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _position(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
