"""Training checkpoints: a folder `step_NNNNNN` with one safetensors file per process and a JSON index.

Every process writes the blocks of the tensors that it holds, and a reader takes the blocks it needs from all files, so
any number of processes, sharded or not, can resume. Nothing is pickled. A folder is renamed to its final name once it
is completely on disk, so a checkpoint with a valid name is complete.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prism_deco.distributed import gather_objects
from prism_deco.errors import UsageError
from prism_deco.exits import CheckpointFailed
from prism_deco.files import inside, sync_folder, verify_sha256, write_json
from prism_deco.tensors import all_finite, open_safetensors, write_safetensors
from prism_deco.training.sharding import piece_of

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
INDEX = "index.json"
MODEL = "model."
"""Prefix of the names of the model's tensors; the optimizer's is `optimizer.`"""

_FORMAT = 1
_HINT = (
    "Remove this checkpoint's folder: training then continues from an earlier one, or from the start. To export a "
    "model, name another checkpoint."
)
_FILE = "rank_{:05d}.safetensors"
_BUILDING, _REMOVING = ".building-", ".removing-"
_NAME = re.compile(r"step_\d{6,}")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / INDEX).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return next(reversed(list_checkpoints(folder)), None)


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Path:
    """Writes a checkpoint; every process of the group must call this with its part of the same tensors.

    Args:
        folder: the run's `checkpoints`.
        tensors: by name. Ordinary tensors, which are equal on all ranks, are written by rank 0; DTensors by all.
        content: further entries of the JSON index.

    Returns:
        The checkpoint's folder. An existing checkpoint is not written again.

    Raises:
        CheckpointFailed: on every process, if one of them could not write; earlier checkpoints are untouched.
    """
    final = folder / checkpoint_name(step)
    building = folder / f"{_BUILDING}{final.name}"
    rank, size = _place()
    if gather_objects((final / INDEX).is_file())[0]:
        return final
    pieces: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for name, tensor in tensors.items():
        if piece := piece_of(tensor, rank):
            pieces[name] = piece.tensor
            places[name] = json.dumps([list(piece.shape), list(piece.offset)])
    needed = sum(gather_objects(sum(piece.nbytes for piece in pieces.values())))
    digest = ""
    with _failing_together(building, needed):
        if rank == 0:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
    with _failing_together(building, needed):
        digest = write_safetensors(building / _FILE.format(rank), pieces, metadata=places)
    files = [_FILE.format(r) for r in range(size)]
    digests = dict(zip(files, gather_objects(digest), strict=True))
    index = {"format": _FORMAT, "step": step, "files": files, "sha256": digests, **content}
    with _failing_together(building, needed):
        if rank == 0:
            write_json(building / INDEX, index)
            sync_folder(building)
            building.rename(final)
            sync_folder(folder)
    return final


class Checkpoint:
    """Reads tensors, or blocks of them, from a checkpoint.

    Args:
        folder: `checkpoints/step_NNNNNN`; `UsageError` if that is no readable checkpoint.

    Attributes:
        folder: the checkpoint's folder.
        step: optimizer steps taken.
        content: the JSON index.
        shapes: whole shape of each tensor, by name.
    """

    def __init__(self, folder: Path):
        if not (folder / INDEX).is_file():
            raise UsageError(f"{folder} is not a checkpoint (no {INDEX}).")
        self.folder = folder
        try:
            self.content: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            version, step, files = (self.content[key] for key in ("format", "step", "files"))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder / INDEX} is damaged ({type(error).__name__}). {_HINT}") from error
        if version != _FORMAT:
            raise UsageError(f"{folder} has format {version}; this version reads format {_FORMAT}.")
        self.step: int = step
        self.shapes: dict[str, tuple[int, ...]] = {}
        # The blocks of each tensor: a lazy safetensors slice, and its offset in the whole tensor.
        self._pieces: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}
        self._digests: dict[str, str] = self.content.get("sha256") or {}
        for name in files:
            file = open_safetensors(inside(folder, name, folder / INDEX), _HINT)
            for key, place in (file.metadata() or {}).items():
                shape, offset = json.loads(place)
                self.shapes[key] = tuple(shape)
                self._pieces.setdefault(key, []).append((file.get_slice(key), tuple(offset)))

    def verify(self) -> None:
        """Compares the files with their checksums, a share of them on each process: all of the group must call this.

        Raises:
            UsageError: on every process, if a file was damaged or replaced since it was written.
        """
        if not self._digests:
            log.info("%s has no checksums and is not verified", self.folder)
        rank, size = _place()
        share = {name: self._digests[name] for name in sorted(self._digests)[rank::size]}
        problem = None
        try:
            verify_sha256(self.folder, share, self.folder / INDEX, _HINT)
        except UsageError as error:
            problem = str(error)
        for found in gather_objects(problem):
            if found:
                raise UsageError(found)

    def read(self, name: str, shape: Sequence[int] | None = None, offset: Sequence[int] | None = None) -> Tensor:
        """A tensor, or the block of it with that shape and offset; `UsageError` if it is not finite."""
        shape = self.shapes[name] if shape is None else tuple(shape)
        offset = (0,) * len(shape) if offset is None else tuple(offset)
        pieces = self._pieces[name]
        first, _ = pieces[0]
        empty = first[(slice(0, 0),) * len(shape)]  # reads no data; of a scalar, the scalar
        result = torch.empty(shape, dtype=empty.dtype)
        for stored, start in pieces:
            _copy_overlap(stored, start, result, offset)
        if not all_finite(result):
            raise UsageError(f"{self.folder}: {name} holds NaN or infinite numbers. {_HINT}")
        return result

    def names(self, prefix: str) -> list[str]:
        """Sorted names of the tensors that start with `prefix`."""
        return sorted(name for name in self.shapes if name.startswith(prefix))


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the one after `best` steps."""
    kept = None if best is None else checkpoint_name(best)
    for path in list_checkpoints(folder)[:-keep]:
        if path.name != kept:
            # Renamed first, so that a partly removed folder has no valid name.
            removing = path.with_name(f"{_REMOVING}{path.name}")
            path.rename(removing)
            shutil.rmtree(removing)


def remove_leftovers(folder: Path) -> None:
    """Removes partly written or partly removed checkpoints that a killed process left behind."""
    for pattern in (_BUILDING, _REMOVING):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path)


def _copy_overlap(stored: Any, stored_offset: tuple[int, ...], target: Tensor, target_offset: tuple[int, ...]) -> None:
    """Copies the intersection of two blocks of a tensor, whose offsets are in the whole tensor."""
    source, goal = [], []
    dimensions = zip(stored_offset, stored.get_shape(), target_offset, target.shape, strict=True)
    for stored_start, stored_size, start, size in dimensions:
        low, high = max(stored_start, start), min(stored_start + stored_size, start + size)
        if low >= high:
            return
        source.append(slice(low - stored_start, high - stored_start))
        goal.append(slice(low - start, high - start))
    target[tuple(goal)] = stored[tuple(source)]


def _place() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def _failing_together(building: Path, needed: int) -> Iterator[None]:
    """Turns an `OSError` in one process into a `CheckpointFailed` in all. Also acts as a barrier.

    Args:
        building: the unfinished checkpoint, which is removed on failure.
        needed: its size in bytes.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [problem for problem in gather_objects(problem) if problem]
    if problems:
        shutil.rmtree(building, ignore_errors=True)
        last = newest_checkpoint(building.parent)
        final = building.with_name(building.name.removeprefix(_BUILDING))
        raise CheckpointFailed(
            f"{final} could not be written ({problems[0]}); it needs {needed / 1e6:.1f} MB. Free some space or make "
            f"the folder writable; training continues from {last.name if last else 'the start'}"
        )
