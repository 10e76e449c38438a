"""Builds the index of a file of records: the records as lines, a table for samplers and splits, and the faults."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from prism_deco.config import building_folder
from prism_deco.data.base import RecordError
from prism_deco.data.formats import as_llava
from prism_deco.data.llava_json import parse_record, read_entries, record_id
from prism_deco.data.packing import ImagePacker, TableFile, check_space, read_rows

VERSION = 6
"""Version of the index format. It is part of an index's folder name, so that a new version builds a new index."""

ROW = np.dtype(
    [
        ("start", np.int64),  # byte range in `records.jsonl`
        ("end", np.int64),
        ("words", np.int32),  # whitespace-separated words of all turns: the length that samplers use
        ("num_images", np.int32),
        ("odd", np.bool_),  # only `recipe.odd_records=train` trains on it
        ("system", np.bool_),  # begins with a system turn, which not every chat format supports
        ("position", np.float64),  # in [0, 1): hash of its image, or of its id; equal if records share an image
        ("entry", np.int64),  # number in the file, counting unusable entries
    ]
)
"""One row of `rows.npy`, the table of records."""


def build_index(path: Path, tables: Sequence[TableFile], digest: str, image_root: Path | None, folder: Path) -> None:
    """Writes the index of a file into `folder`, which appears only when it is complete.

    Args:
        path: the JSON file; not read if there are `tables`.
        tables: Parquet and Arrow files.
        digest: SHA-256 of the JSON file.
    """
    building = building_folder(folder)
    try:
        if tables:
            check_space(tables, building)
            with closing(ImagePacker(building)) as packer:
                digest = _write_records(read_rows(tables), image_root, building, packer)
        else:
            _write_records(read_entries(path), image_root, building)
        (building / "index.json").write_text(json.dumps({"source": str(path), "sha256": digest}))
        try:
            os.replace(building, folder)
        except OSError:
            # Another process has finished the same index first, with the same content.
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_records(
    entries: Iterable[Any], image_root: Path | None, folder: Path, packer: ImagePacker | None = None
) -> str:
    """Writes the files of an index; returns the SHA-256 of its records and refused entries."""
    rows: list[tuple[Any, ...]] = []
    joined: list[tuple[str, ...]] = []
    digest = hashlib.sha256()
    end = 0
    with (
        (folder / "records.jsonl").open("wb") as lines,
        (folder / "refused.jsonl").open("w") as refused,
        (folder / "noted.jsonl").open("w") as noted,
    ):
        for number, raw in enumerate(entries):
            name = record_id(raw, number)
            where = f"record {number} (id {name})" if name != f"record {number}" else name
            fault = {"entry": number, "id": name}
            try:
                entry = as_llava(raw)
                if packer is not None:
                    entry = packer.pack(entry)
                record, oddities = parse_record(entry, name, image_root)
            except RecordError as error:
                fault |= {"kind": error.kind, "detail": f"{where}: {error}", "usable": False}
                line = json.dumps(fault)
                refused.write(f"{line}\n")
                digest.update(line.encode())  # so a reworded `RecordError` changes the hash of a Parquet data set
                continue
            for kind, detail in oddities.items():
                fault |= {"kind": kind, "detail": f"{where}: {detail}", "usable": True}
                refused.write(f"{json.dumps(fault)}\n")
            if not isinstance(raw.get("id"), str | None):
                detail = f"{where}: the id is of Python's type {type(raw['id']).__name__}, not text."
                noted.write(f"{json.dumps(fault | {'kind': 'id_type', 'detail': detail})}\n")
            content = {"id": record.id, "images": record.images, "messages": record.messages}
            encoded = json.dumps(content).encode() + b"\n"
            lines.write(encoded)
            digest.update(encoded)
            start = end
            end += len(encoded)
            words = sum(len(message["content"].split()) for message in record.messages)
            position = _position(record.images[0] if record.images else record.id)
            system = record.messages[0]["role"] == "system"
            rows.append((start, end, words, len(record.images), bool(oddities), system, position, number))
            if len(record.images) > 1:
                joined.append(record.images)
    table = np.array(rows, dtype=ROW)
    if joined:
        _join_positions(folder, table["position"], joined)
    np.save(folder / "rows.npy", table)
    return digest.hexdigest()


def _join_positions(folder: Path, positions: np.ndarray, joined: Sequence[tuple[str, ...]]) -> None:
    """Gives all records with a common image the same position, so that a split cannot separate them.

    The images of one record are linked; records whose images are linked, also through other records, share a position.

    Args:
        positions: float64[n], changed in place.
        joined: the images of each record that has several.
    """
    parent: dict[str, str] = {}  # union-find with path halving

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for first, *others in joined:
        for other in others:
            # The smaller name becomes the root, so that the result does not depend on the order of the records.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    with (folder / "records.jsonl").open("rb") as file:
        for row, line in enumerate(file):
            images = json.loads(line)["images"]
            if images and images[0] in parent:
                positions[row] = _position(root(images[0]))


def _position(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
