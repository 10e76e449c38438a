"""The index of a file of records: its lines, and what samplers and splits need to know of each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.config import building_folder
from prism_deco.data.llava_json import RecordError, parse_record, read_json_list
from prism_deco.data.packing import ImagePacker, check_space, read_rows


def build_index(path: Path, tables: list[Path], digest: str, folder: Path) -> None:
    """Writes the index of a file into `folder`: all of it, or nothing.

    Args:
        path: the JSON file; not read if there are `tables`.
        tables: Parquet and Arrow files.
        digest: SHA-256 of the JSON file.
    """
    building = building_folder(folder)
    try:
        with ExitStack() as stack:
            entries: Iterable[Any] = read_json_list(path)
            if tables:
                check_space(tables, building)
                packer = stack.enter_context(ImagePacker(building))
                entries = (packer.pack(row) for row in read_rows(tables))
            written = _write_records(entries, building)
        index = {"source": str(path), "sha256": written if tables else digest}
        (building / "index.json").write_text(json.dumps(index))
        try:
            os.replace(building, folder)
        except OSError:
            # Another process finished the same index first; its content is the same.
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_records(entries: Iterable[Any], folder: Path) -> str:
    """Writes the files of an index, and returns the SHA-256 of its records."""
    offsets, words, has_image, positions, numbers = [0], [], [], [], []
    joined: list[tuple[str, ...]] = []
    digest = hashlib.sha256()
    with (folder / "records.jsonl").open("wb") as file, (folder / "faults.jsonl").open("w", encoding="utf-8") as faults:
        for number, raw in enumerate(entries):
            try:
                record = parse_record(raw, f"record {number}")
            except RecordError as error:
                fault = {"entry": number, "id": error.id, "kind": error.kind, "detail": str(error)}
                faults.write(json.dumps(fault) + "\n")
                digest.update(json.dumps(fault).encode())
                continue
            line = json.dumps({"id": record.id, "images": record.images, "messages": record.messages}).encode() + b"\n"
            digest.update(line)
            offsets.append(offsets[-1] + file.write(line))
            words.append(sum(len(m["content"].split()) for m in record.messages))
            has_image.append(bool(record.images))
            positions.append(_position(record.images[0] if record.images else record.id))
            numbers.append(number)
            if len(record.images) > 1:
                joined.append(record.images)
    arrays: dict[str, tuple[list[Any], Any]] = {
        "offsets": (offsets, np.int64),
        "words": (words, np.int32),
        "has_image": (has_image, np.bool_),
        "entries": (numbers, np.int64),
        "positions": (positions, np.float64),
    }
    for name, (values, dtype) in arrays.items():
        np.save(folder / f"{name}.npy", np.array(values, dtype=dtype))
    if joined:
        _join_positions(folder, np.array(positions), joined)
    return digest.hexdigest()


def _join_positions(folder: Path, positions: np.ndarray, joined: Sequence[tuple[str, ...]]) -> None:
    """Gives images that occur together one common position, and with them every record that shows one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for first, *others in joined:
        for other in others:
            # The smaller name leads, so that the result does not depend on the order of the records.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    with (folder / "records.jsonl").open("rb") as file:
        for row, line in enumerate(file):
            images = json.loads(line)["images"]
            if images and images[0] in parent:
                positions[row] = _position(root(images[0]))
    np.save(folder / "positions.npy", positions)


def _position(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
