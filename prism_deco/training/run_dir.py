"""The run's folder: whether a command line starts a run, resumes one, or finds it complete."""

from __future__ import annotations

import fcntl
import logging
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
from prism_deco.files import full_disk, refusals_named, remove_unfinished
from prism_deco.training.checkpoints import CHECKPOINTS, newest_checkpoint, remove_leftovers
from prism_deco.training.progress import THROUGH, is_requeued, read_status

log = logging.getLogger(__name__)

_CUT = ("recipe.micro_batch_size", "trainer.devices", "trainer.num_nodes")
"""Keys that determine which records form a micro-batch, and so a loss that is a mean over micro-batches."""

_LOCK = ".lock"


@dataclass(frozen=True)
class RunTarget:
    """What to do in the run's folder.

    Attributes:
        state: train, or one of `THROUGH`.
        checkpoint: where training resumes; None to start from the beginning.
        replaces: whether the folder holds an earlier run to remove.
    """

    folder: Path
    state: str = "train"
    checkpoint: Path | None = None
    replaces: bool = False


def run_folder(config: DictConfig) -> Path:
    """The run's folder. Sets `run_id` to the default if it is not set."""
    config.run_id = config.run_id or default_run_id(config)
    return Path(config.runs_dir) / config.run_id


def find_run(config: DictConfig, *, overwrite: bool = False) -> RunTarget:
    """Finds out whether to start, resume or skip a run. Changes nothing on disk.

    Args:
        overwrite: replace an earlier run in the folder, unless this job itself started that before it was requeued.

    Raises:
        UsageError: the folder holds a run of another configuration, or something else.
    """
    folder = run_folder(config)
    # A start that was killed or found the disk full leaves hidden files: the lock, a temporary file.
    with refusals_named(folder, "Choose another folder: runs_dir=FOLDER."):
        if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
            return RunTarget(folder)
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} exists but is not a run folder (no {CONFIG}). Choose another run_id=NAME.")
    if overwrite and not is_requeued(folder):
        return RunTarget(folder, replaces=True)
    earlier, now = flat(read_config(folder / CONFIG)), flat(config)
    differing = []
    for key in sorted(earlier | now):
        if not is_free(key) and earlier.get(key) != now.get(key):
            differing.append(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}")
    if differing:
        more = " ..." if len(differing) > 5 else ""
        raise UsageError(
            f"{folder} already holds a run of another configuration: {'; '.join(differing[:5])}{more}. "
            "Use run_id=NAME for this one, or --overwrite to replace the earlier one."
        )
    state = read_status(folder).get("state")
    if state in THROUGH:
        return RunTarget(folder, state)
    return RunTarget(folder, checkpoint=newest_checkpoint(folder / CHECKPOINTS))


def open_run(config: DictConfig, found: RunTarget, held: ExitStack) -> RunTarget:
    """Locks the run's folder and writes its `config.yaml`; creates the folder if necessary.

    Args:
        found: the result of `find_run`.
        held: keeps the lock until it is closed.

    Raises:
        UsageError: another process trains the run.
    """
    folder = found.folder
    if found.replaces:
        with locked(folder):
            _remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder))
    remove_unfinished(folder)
    remove_leftovers(folder / CHECKPOINTS)
    target = find_run(config)  # again: another process may have trained it before this one got the lock
    if target.state == "train" and (folder / CONFIG).is_file():
        _log_continued(config, target)
    if target.state != "done":
        save_config(config, folder / CONFIG)
    return target


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns the error of a write to a full disk into a `DiskFull` that names the folder and the space needed."""
    try:
        yield
    except Exception as error:
        if isinstance(error, Stop | UsageError) or not is_disk_full(error):
            raise  # a Stop or UsageError states its reason in one line already
        newest = newest_checkpoint(folder / CHECKPOINTS)
        needed = "some space"
        if newest is not None:
            size = sum(path.stat().st_size for path in newest.iterdir())
            needed = f"{size / 1e6:.1f} MB for the next checkpoint"
        raise DiskFull(f"{full_disk([folder, cache_dir()], error)} Free {needed}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run; `UsageError` if another process trains it. Does nothing on a file system without locks."""
    with (folder / _LOCK).open("a") as file:
        try:
            # Not flock: forked loader processes would inherit the lock and hold it for some seconds after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{folder} is being trained by another process. Wait for it to end, or use run_id=NAME."
            ) from error
        except OSError:
            pass
        yield


def _remove(folder: Path) -> None:
    """Removes a run; renames it first, so that a kill in between leaves nothing that looks like a run."""
    log.warning("Removing the earlier run in %s", folder)
    removing = folder.parent / f".removing-{folder.name}"
    shutil.rmtree(removing, ignore_errors=True)
    folder.rename(removing)
    (removing / CONFIG).unlink()
    shutil.rmtree(removing)


def _log_continued(config: DictConfig, target: RunTarget) -> None:
    """Logs where an unfinished run resumes, and warns if its loss changes."""
    checkpoint = target.checkpoint
    if checkpoint and config.recipe.loss == "micro_batch_mean":
        earlier, now = flat(read_config(target.folder / CONFIG)), flat(config)
        changed = [f"{key} was {earlier[key]} and is {now[key]}" for key in _CUT if earlier[key] != now[key]]
        if changed:
            log.warning("%s: the loss, a mean over micro-batches, changes from here on", ", ".join(changed))
    where = checkpoint.name if checkpoint else "the start: it has no checkpoint yet"
    log.info("%s holds an unfinished run; training continues from %s", target.folder, where)
