"""`SHA256SUMS` of a model folder. `sha256sum -c` reads it, too."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from prism_deco.errors import UsageError
from prism_deco.files import file_sha256, read_json, verify_sha256, write_whole

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"

_TRAINED = ("model.safetensors", "adapter/adapter_model.safetensors")
_SUFFIXES = (".safetensors", ".json", ".model", ".jinja", ".txt")
"""Not `config.yaml`, where a user may point at other copies of frozen weights, nor a README."""


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Writes `SHA256SUMS`, after everything else that `load_model` reads.

    Args:
        known: checksums that were computed when a file was written.
    """
    digests = dict(known)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _SUFFIXES and name not in digests:
            digests[name] = file_sha256(path)
    write_whole(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


def verify_model(folder: Path) -> None:
    """Compares the files of a model folder with their checksums.

    Raises:
        UsageError: a file is missing, was damaged or replaced, or the model is not the one that its run trained.
    """
    if not (folder / SUMS).is_file():
        log.info("%s has no checksums: it is not verified", folder)
        return
    digests = _read_sums(folder)
    way_out = "Restore the folder from a copy, or write the model again from a checkpoint (prism-deco export)."
    verify_sha256(folder, digests, folder / SUMS, way_out)
    manifest = folder.parent / "manifest.json"
    if folder.name == "model" and manifest.is_file():
        trained = read_json(manifest).get("model_sha256")
        if trained not in (None, trained_sha256(folder)):
            raise UsageError(f"{folder} is not the model that the run trained: {manifest} names another. {way_out}")


def _read_sums(folder: Path) -> dict[str, str]:
    digests = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        digests[name] = digest
    return digests


def trained_sha256(folder: Path) -> str:
    """SHA-256 of the weights that `save_model` wrote; with adapters, of both files' hashes."""
    digests = _read_sums(folder)
    hashes = [digests[name] for name in _TRAINED if name in digests]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
