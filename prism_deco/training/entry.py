"""The body of `prism-deco train`: starts the processes, trains, scores, and returns the exit code."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack, suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import compose, read_config, save_config
from prism_deco.config.registry import import_plugins
from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.exits import CheckpointFailed, DiskFull, Preempted, Preemption, RankFailed, Stop, as_stop
from prism_deco.processes import clear_failures, start_ranks
from prism_deco.training.board import FOLDER
from prism_deco.training.datamodule import Conversations
from prism_deco.training.preconditions import Scoring, check_all
from prism_deco.training.progress import THROUGH, read_status, set_status
from prism_deco.training.run_dir import CONFIG, RunTarget, find_run, full_disk_named, locked, open_run, run_folder
from prism_deco.training.trainer import train

log = logging.getLogger(__name__)


def run(config: DictConfig, scoring: Scoring | None, *, overwrite: bool = False, force: bool = False) -> int:
    """Trains and scores the configured run, or resumes it.

    Args:
        scoring: follows training. Of a complete run, only the part without results is measured. None measures nothing.
        overwrite: replace an earlier run in the folder.
        force: with `trainer.activation_checkpointing=auto`, train even if the estimated memory exceeds the device's.

    Returns:
        The exit code: 0 done, 75 preempted, 76 out of memory, 130 interrupted, 1 another failure.
    """
    world = World.of(config.trainer)
    folder = run_folder(config)
    try:
        if world.starts_ranks:
            # As plain containers: the dataclasses of a composed configuration cannot be pickled.
            return start_ranks(_run, (OmegaConf.to_container(config), scoring, overwrite, force), world)
        with full_disk_named(folder):
            return _run(config, scoring, overwrite, force)
    except (Stop, KeyboardInterrupt) as error:
        stop = as_stop(error)
        assert stop is not None
        if isinstance(stop, RankFailed):
            _record_failure(config, stop)
        sys.stderr.write(f"prism-deco: {stop.state.replace('_', ' ')}: {_advised(stop, overwrite)}\n")
        return stop.exit_code


def _run(config: Any, scoring: Scoring | None, overwrite: bool, force: bool) -> int:
    """`run` in each process."""
    config = config if isinstance(config, DictConfig) else compose(config)
    world = World.of(config.trainer)
    preemption = Preemption(alone=world.size == 1)
    # Handle signals only once the process group exists: joining it does not react to them.
    with world.joined(), preemption.watched(), ExitStack() as held:
        import_plugins(config.plugins)
        opened: list[Conversations] = []
        target, config.trainer.activation_checkpointing = world.decide(
            lambda: _prepare(config, scoring, world, held, opened, overwrite=overwrite, force=force)
        )
        if target.state == "done":
            scoring = world.decide(lambda: _added(config, target, scoring))
            if scoring is None:
                return 0
        if target.state == "train":
            train(config, opened[0] if opened else None, target, world, preemption)
        if preemption.requested:
            raise preemption.requested("stopped before scoring")
        if scoring is not None:
            scoring(target.folder, world)
        if world.is_main:
            set_status(target.folder, **read_status(target.folder) | {"state": "done"})
        log.info("Run folder: %s", target.folder)
        if (target.folder / FOLDER).is_dir():
            log.info("Show it with: tensorboard --logdir %s", config.runs_dir)
        return 0


def _prepare(
    config: DictConfig,
    scoring: Scoring | None,
    world: World,
    held: ExitStack,
    opened: list[Conversations],
    *,
    overwrite: bool,
    force: bool,
) -> tuple[RunTarget, str]:
    """Checks all preconditions, then creates or opens the run's folder; called on rank 0, for all.

    Args:
        held: keeps the lock of the folder until it is closed.
        opened: receives the data that the checks opened, which stay on rank 0.

    Returns:
        The folder, and the value of `trainer.activation_checkpointing`.
    """
    found = find_run(config, overwrite=overwrite)
    if found.state == "train":
        opened.append(check_all(config, world, scoring=scoring, resume=found.checkpoint, force=force))
    target = open_run(config, found, held)
    clear_failures(target.folder)
    return target, config.trainer.activation_checkpointing


def _added(config: DictConfig, target: RunTarget, scoring: Scoring | None) -> Scoring | None:
    """The part of the scoring that a complete run has no results of. Adds the request to the run's `config.yaml`."""
    missing = scoring.missing(target.folder) if scoring is not None else None
    if missing is None:
        log.info("Run %s is complete. Use run_id=NAME to start another, or --overwrite to replace it.", target.folder)
        return None
    log.info("Run %s is complete except for the scoring that was added", target.folder)
    recorded = read_config(target.folder / CONFIG)
    recorded.evaluate = config.evaluate
    save_config(recorded, target.folder / CONFIG)
    return missing


def _record_failure(config: DictConfig, stop: Stop) -> None:
    """Writes the status of a run whose ranks were killed, which they could not do themselves."""
    folder = run_folder(config)
    if read_status(folder).get("state") in (None, *THROUGH):
        return
    with suppress(UsageError), locked(folder):  # unless another command is training it by now
        set_status(folder, stop.state, reason=str(stop))


def _advised(stop: Stop, overwrite: bool) -> str:
    """The reason in one line, with how to continue if repeating the command does that."""
    reason = " ".join(str(stop).split())
    if not isinstance(stop, Preempted | CheckpointFailed | DiskFull):
        return reason
    command = "the same command without --overwrite" if overwrite else "the same command"
    return f"{reason}; run {command} to continue"
