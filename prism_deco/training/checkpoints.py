"""Checkpoints: a folder `step_NNNNNN` of safetensors, one file per process, and a JSON index.

Every process writes the blocks of the tensors that it holds; a reader takes what it needs out of all files,
so that any number of processes, sharded or not, can continue. Nothing is pickled. A folder gets its name when all of it
is on the disk: what has a valid name can be read.
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
"""What the names of the model's tensors begin with; those of the optimizer begin with `optimizer.`"""

_FORMAT = 1
_WAY_OUT = (
    "Remove this checkpoint's folder: training then continues from an earlier one, or from the start. To export a "
    "model, name another checkpoint."
)
_FILE = "rank_{:05d}.safetensors"
_BUILDING, _REMOVING = ".building-", ".removing-"
_NAME = re.compile(r"step_(\d{6,})")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after that many optimizer steps."""
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """The optimizer steps behind a checkpoint folder."""
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / INDEX).is_file()]
    return sorted(found, key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return max(list_checkpoints(folder), key=step_of, default=None)


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Path:
    """Writes a checkpoint; every process of the group must call it with its part of the same tensors.

    Args:
        folder: the run's `checkpoints`.
        tensors: plain ones are the same everywhere, and the first process writes them.
        content: anything else, as JSON.

    Returns:
        The checkpoint's folder. An existing one is left as it is.

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
    """Reads a checkpoint piece by piece; needs no process group.

    Args:
        folder: `checkpoints/step_NNNNNN`.

    Attributes:
        folder: the checkpoint's folder.
        step: optimizer steps taken.
        content: what was saved next to the tensors.
        shapes: name of each tensor and its whole shape.

    Raises:
        UsageError: it is not a checkpoint, damaged, or one of another version.
    """

    def __init__(self, folder: Path):
        if not (folder / INDEX).is_file():
            raise UsageError(f"{folder} is not a checkpoint (no {INDEX}).")
        self.folder = folder
        try:
            self.content: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            version, step, files = (self.content[key] for key in ("format", "step", "files"))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder / INDEX} is damaged ({type(error).__name__}). {_WAY_OUT}") from error
        if version != _FORMAT:
            raise UsageError(f"{folder} has format {version}; this version reads format {_FORMAT}.")
        self.step: int = step
        self.shapes: dict[str, tuple[int, ...]] = {}
        # The blocks of each tensor, as slices that read on demand, and where they begin in the whole tensor.
        self._pieces: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}
        self._digests: dict[str, str] = self.content.get("sha256") or {}
        for name in files:
            file = open_safetensors(inside(folder, name, folder / INDEX), _WAY_OUT)
            for key, place in (file.metadata() or {}).items():
                shape, offset = json.loads(place)
                self.shapes[key] = tuple(shape)
                self._pieces.setdefault(key, []).append((file.get_slice(key), tuple(offset)))

    def verify(self) -> None:
        """Compares the files with their checksums; every process of the group must call it, each takes its share.

        Raises:
            UsageError: on every process, if a file was damaged or replaced since it was written.
        """
        if not self._digests:
            log.info("%s has no checksums and is not verified", self.folder)
        rank, size = _place()
        share = {name: self._digests[name] for name in sorted(self._digests)[rank::size]}
        problem = None
        try:
            verify_sha256(self.folder, share, self.folder / INDEX, _WAY_OUT)
        except UsageError as error:
            problem = str(error)
        for found in gather_objects(problem):
            if found:
                raise UsageError(found)

    def read(self, name: str, shape: Sequence[int] | None = None, offset: Sequence[int] | None = None) -> Tensor:
        """A tensor, or the block of it with that shape and offset.

        Raises:
            UsageError: it holds NaN or infinite numbers.
        """
        shape = self.shapes[name] if shape is None else tuple(shape)
        offset = (0,) * len(shape) if offset is None else tuple(offset)
        pieces = self._pieces[name]
        first, _ = pieces[0]
        empty = first[(slice(0, 0),) * len(shape)]  # reads no data; of a scalar, the scalar
        result = torch.empty(shape, dtype=empty.dtype)
        for stored, start in pieces:
            _copy_overlap(stored, start, result, offset)
        if not all_finite(result):
            raise UsageError(f"{self.folder}: {name} holds NaN or infinite numbers. {_WAY_OUT}")
        return result

    def names(self, prefix: str) -> list[str]:
        """Names of the tensors that begin with `prefix`."""
        return sorted(name for name in self.shapes if name.startswith(prefix))


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the one after `best` steps."""
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) != best:
            # Renamed first: a partly removed folder must not have a valid name.
            removing = path.with_name(f"{_REMOVING}{path.name}")
            path.rename(removing)
            shutil.rmtree(removing)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for pattern in (_BUILDING, _REMOVING):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path)


def _copy_overlap(stored: Any, stored_offset: tuple[int, ...], target: Tensor, target_offset: tuple[int, ...]) -> None:
    """Copies the intersection of two blocks of one tensor; the offsets say where they begin in the whole."""
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
    """Turns an `OSError` in one process into a `CheckpointFailed` in all; it also keeps them in step.

    Args:
        building: the unfinished checkpoint, which is removed.
        needed: its bytes.
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
