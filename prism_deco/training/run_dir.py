"""The run's folder: whether a command line starts a run, continues one, or finds it complete."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from prism_deco.config import cache_dir, default_run_id, flat, is_free, read_config, save_config
from prism_deco.config.load import CONFIG
from prism_deco.errors import UsageError
from prism_deco.exits import DiskFull, Stop, is_disk_full
from prism_deco.files import remove_unfinished
from prism_deco.training.checkpoints import CHECKPOINTS, newest_checkpoint, remove_leftovers
from prism_deco.training.progress import THROUGH, is_requeued, read_status

log = logging.getLogger(__name__)

_CUT = ("recipe.micro_batch_size", "trainer.devices", "trainer.num_nodes")
"""How records fall into micro-batches: where the loss is a mean over these, what is learned depends on it."""

_LOCK = ".lock"


@dataclass(frozen=True)
class RunTarget:
    """What a command line amounts to."""

    folder: Path
    state: str = "train"
    """Train, or one of `THROUGH`."""
    checkpoint: Path | None = None
    """Where training continues; None is its start."""


def run_folder(config: DictConfig) -> Path:
    """The run's folder; gives the run its name where it has none."""
    config.run_id = config.run_id or default_run_id(config)
    return Path(config.runs_dir) / config.run_id


def replaces(config: DictConfig, overwrite: bool) -> bool:
    """Whether `--overwrite` removes what is in the folder. It is meant for what was there before the job."""
    return overwrite and not is_requeued(run_folder(config))


def has_finished(config: DictConfig, overwrite: bool) -> bool:
    """Whether the folder holds this run, and its training has finished.

    Raises:
        UsageError: see `holds_run`.
    """
    if replaces(config, overwrite):
        return False
    return holds_run(config) and read_status(run_folder(config)).get("state") in THROUGH


def resumed_from(config: DictConfig, overwrite: bool) -> Path | None:
    """The checkpoint that training would continue from; None is its start."""
    folder = run_folder(config) / CHECKPOINTS
    return None if replaces(config, overwrite) or not folder.is_dir() else newest_checkpoint(folder)


def open_run(config: DictConfig, held: ExitStack, *, overwrite: bool = False) -> RunTarget:
    """Creates the run's folder with its `config.yaml`, or finds where the run in it stands; locks it.

    Args:
        held: holds the lock.

    Raises:
        UsageError: the folder holds a run of another configuration, or something else, or another process trains it.
    """
    folder = run_folder(config)
    if _is_run(folder) and replaces(config, overwrite):
        with locked(folder):
            _remove(folder)
    is_known = holds_run(config)
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder))
    remove_unfinished(folder)
    remove_leftovers(folder / CHECKPOINTS)
    target = _found(config, folder) if is_known else RunTarget(folder)
    if target.state != "done":
        save_config(config, folder / CONFIG)
    return target


def holds_run(config: DictConfig) -> bool:
    """Whether the run's folder holds this run already.

    Raises:
        UsageError: it holds a run of another configuration, or something else.
    """
    folder = run_folder(config)
    if not _is_run(folder):
        return False
    earlier, now = flat(read_config(folder / CONFIG)), flat(config)
    differing = []
    for key in sorted(earlier | now):
        if not is_free(key) and earlier.get(key) != now.get(key):
            differing.append(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}")
    if differing:
        more = " ..." if len(differing) > 5 else ""
        raise UsageError(
            f"{folder} already holds a run of another configuration: {'; '.join(differing[:5])}{more}. "
            "Name this one run_id=NAME, or replace the earlier one with --overwrite."
        )
    return True


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raises `DiskFull`, which names the folder and how much a run needs, where a write finds no room."""
    try:
        yield
    except Exception as error:
        if isinstance(error, Stop | UsageError) or not is_disk_full(error):
            raise  # the first two have their reason in one line already
        # A write that fails does not say where: the cache may lie on another disk.
        place = min((folder, cache_dir()), key=_free_bytes)
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        free = f"{_free_bytes(place) / 1e6:.1f} MB free"
        raise DiskFull(f"{place}: {reason} ({free}). Free {_needed_space(folder)}") from error


def _needed_space(run: Path) -> str:
    """The next checkpoint takes what the newest one does."""
    newest = newest_checkpoint(run / CHECKPOINTS)
    if newest is None:
        return "some space"
    return f"{sum(path.stat().st_size for path in newest.iterdir()) / 1e6:.1f} MB for the next checkpoint"


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training the same run; does nothing on a file system without locks.

    Raises:
        UsageError: another process trains it.
    """
    with (folder / _LOCK).open("a") as file:
        try:
            # Not flock: loader processes would inherit that, and hold it for some seconds after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{folder} is being trained by another process. Wait for it, or use run_id=NAME."
            ) from error
        except OSError:
            pass
        yield


def _is_run(folder: Path) -> bool:
    # A start that was killed, or found the disk full, leaves hidden files: the lock, a file not written whole.
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return False
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} exists but is not a run folder (no {CONFIG}). Choose another run_id=NAME.")
    return True


def _remove(folder: Path) -> None:
    """Removes a run so that a kill on the way leaves nothing that looks like one."""
    log.warning("Removing the earlier run in %s", folder)
    removing = folder.parent / f".removing-{folder.name}"
    shutil.rmtree(removing, ignore_errors=True)
    folder.rename(removing)
    (removing / CONFIG).unlink()
    shutil.rmtree(removing)


def _found(config: DictConfig, folder: Path) -> RunTarget:
    state = read_status(folder).get("state")
    if state in THROUGH:
        return RunTarget(folder, state)
    checkpoint = newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint and config.recipe.loss == "micro_batch_mean":
        earlier, now = flat(read_config(folder / CONFIG)), flat(config)
        changed = [f"{key} was {earlier[key]} and is {now[key]}" for key in _CUT if earlier[key] != now[key]]
        if changed:
            log.warning("%s: the loss, a mean over micro-batches, is another one from here on", ", ".join(changed))
    where = checkpoint.name if checkpoint else "its start: it has no checkpoint yet"
    log.info("%s holds this run, unfinished; training continues from %s", folder, where)
    return RunTarget(folder, checkpoint=checkpoint)
