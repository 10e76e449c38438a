"""What `prism-deco train` does, from the processes it takes to the exit code."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig, OmegaConf

from prism_deco.backbones.weights import ASSET
from prism_deco.build import build_encoder, build_model, group, record_options
from prism_deco.config import cache_dir, compose, read_config, save_config
from prism_deco.config.registry import import_plugins
from prism_deco.data import build_source
from prism_deco.data.encoder import check_records
from prism_deco.data.split import open_parts
from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.exits import CheckpointFailed, DiskFull, Preempted, RankFailed, Stop
from prism_deco.llms.checkpointing import ACTIVATION_CHECKPOINTING
from prism_deco.llms.tuning import tuning
from prism_deco.plan import AUTO, plan_run, problems
from prism_deco.plan.accelerators import device_memory
from prism_deco.processes import clear_failures, start_ranks
from prism_deco.training.init_from import check_start, find_start
from prism_deco.training.module import TrainingModule
from prism_deco.training.preemption import Preemption
from prism_deco.training.run_dir import RunTarget, full_disk_named, has_finished, lock_run, open_run, run_folder
from prism_deco.training.sharding import Sharding
from prism_deco.training.status import THROUGH, read_status, set_status
from prism_deco.training.trainer import strategy_of, train

log = logging.getLogger(__name__)


class Scoring(Protocol):
    """What is to be measured of a trained run."""

    def prepare(self, benchmarks: Path | None) -> None:
        """Looks for what would stop it, before there is a model.

        Args:
            benchmarks: the folder of the benchmarks that come with the training data, if any do.

        Raises:
            UsageError: there is something.
        """
        ...

    def missing(self, folder: Path) -> Scoring | None:
        """What of it the run in a folder does not have yet; None where it has all."""
        ...

    def __call__(self, folder: Path, world: World) -> None:
        """Measures it; all processes call this."""
        ...


def run(
    config: DictConfig,
    scoring: Scoring | None,
    *,
    overwrite: bool = False,
    force: bool = False,
) -> int:
    """Trains and scores what the configuration says, or goes on with it where an earlier call has stopped.

    Args:
        scoring: what follows training, also of a run that is done, as far as it lacks it; None is nothing.
        overwrite: replace an earlier run in the folder.
        force: train even what does not fit this machine's memory by its plan.

    Returns:
        The exit code: 0 done, 75 preempted, 76 out of memory, 1 another failure.

    Raises:
        UsageError: wrong input.
    """
    world = World.of(config.trainer)
    try:
        if world.starts_ranks:
            # Plain values: the classes of a composed configuration cannot be pickled.
            return start_ranks(_run, (OmegaConf.to_container(config), scoring, overwrite, force), world)
        with full_disk_named(run_folder(config)):
            return _run(config, scoring, overwrite, force)
    except Stop as stop:
        if isinstance(stop, RankFailed):
            _record(run_folder(config), stop)
        sys.stderr.write(f"prism-deco: {stop.state.replace('_', ' ')}: {_advised(stop, overwrite)}\n")
        return stop.exit_code


def _run(config: Any, scoring: Scoring | None, overwrite: bool, force: bool) -> int:
    """What each process of a run does; see `run`."""
    config = config if isinstance(config, DictConfig) else compose(config)
    world, preemption = World.of(config.trainer), Preemption()
    # Until the processes have met, a signal ends them at once: they wait for each other in code that heeds none.
    with world.joined(), preemption.watched(), ExitStack() as held:
        run_folder(config)
        if not has_finished(config, overwrite):
            _find_files(config)
        import_plugins(config.plugins)  # what is planned, and the benchmarks, may be theirs
        config.trainer.activation_checkpointing = world.decide(lambda: _fit(config, force))
        world.decide(partial(_prepare_scoring, config, scoring, overwrite))
        plan = world.decide(lambda: _open(config, overwrite, held))
        if plan.state == "done":
            scoring = world.decide(partial(_newly_asked, config, plan.folder, scoring))
            if scoring is None:
                log.info(
                    "Run %s is complete. Use run_id=NAME to start another, or --overwrite to replace it.", plan.folder
                )
                return 0
            log.info("Run %s is complete except for the scoring that was added", plan.folder)
        if plan.state == "train":
            train(config, plan, world, preemption)
        if preemption.requested:
            raise preemption.requested("preempted before scoring")
        if scoring is not None:
            scoring(plan.folder, world)
        if world.is_main:
            spent = {key: value for key, value in read_status(plan.folder).items() if key != "state"}
            set_status(plan.folder, "done", **spent)
        log.info("The run is in %s; watch it with: tensorboard --logdir %s", plan.folder, config.runs_dir)
        return 0


def _record(folder: Path, stop: Stop) -> None:
    """Writes the status of a run whose processes were killed; those that were left know less about the reason."""
    if read_status(folder).get("state") in (None, *THROUGH):
        return
    with suppress(UsageError):  # another command is training it by now
        lock = lock_run(folder)
        set_status(folder, stop.state, reason=str(stop))
        if lock:
            lock.close()


def _advised(stop: Stop, overwrite: bool) -> str:
    """The reason in one line, with the way to continue where that is all it takes."""
    reason = " ".join(str(stop).split())
    if not isinstance(stop, Preempted | CheckpointFailed | DiskFull):
        return reason
    command = "the same command without --overwrite" if overwrite else "the same command"
    return f"{reason}; run {command} to continue"


def check(
    config: DictConfig,
    *,
    scoring: Scoring | None = None,
    after: DictConfig | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Looks for what would stop a run, as far as that can be told without its weights and from its data's files alone;
    trains nothing. Nothing would stop a run that is through.

    Args:
        scoring: what is to be measured of the run; None is nothing.
        after: the run that this one starts from, if it is still to be trained.
        overwrite: an earlier run in the folder is to be replaced.
        force: do not mind what does not fit this machine's memory.

    Raises:
        UsageError: the folder holds another run, data are missing, parts do not fit together, or not this machine.
    """
    world = World.of(config.trainer)
    if has_finished(config, overwrite):
        return
    _find_files(config)
    if after is not None:
        check_start(after, config)
    elif config.recipe.start_from:
        find_start(Path(config.recipe.start_from), config)
    vlm, llm = build_model(config, device="meta")
    tuning(config.recipe.lm).check()
    TrainingModule(vlm, config.recipe, total_steps=1, nonfinite=config.trainer.nonfinite)
    strategy_of(config, world)
    if config.trainer.strategy == "fsdp":
        Sharding.of(config.trainer, world.size)
    source = build_source(group(config, "data"))
    if scoring is not None:
        scoring.prepare(source.benchmarks)
    if world.is_main:  # it may index the data
        parts = open_parts(source, cache_dir(), **record_options(config))
        if config.data.on_bad_record == "fail":
            encoder = build_encoder(config, llm, vlm.projector.num_tokens)
            for records in (parts.train, parts.val):
                check_records(records, encoder)
        _fit(config, force)


def _find_files(config: DictConfig) -> None:
    """`UsageError` names a local file or folder that the configuration points at and that is not there: what is read
    last must not wait for what is read first."""
    for name in ("backbone", "llm", "projector"):
        path = config[name].get("weights") if config[name].get("pretrained", True) else None
        if path and not path.startswith(ASSET) and not Path(path).expanduser().exists():
            raise UsageError(f"{name}.weights={path}: there is no such file or folder.")


def _prepare_scoring(config: DictConfig, scoring: Scoring | None, overwrite: bool) -> None:
    """What is wrong with the benchmarks must not wait for the end of training, nor cost an earlier run its folder."""
    # The scoring of a run that is through begins at once, and looks for itself.
    if scoring is not None and not has_finished(config, overwrite):
        scoring.prepare(build_source(group(config, "data")).benchmarks)


def _newly_asked(config: DictConfig, folder: Path, scoring: Scoring | None) -> Scoring | None:
    """What a run that is done has not been scored on; its `config.yaml` then names it, and keeps how it was trained."""
    missing = scoring.missing(folder) if scoring is not None else None
    if missing is not None:
        recorded = read_config(folder / "config.yaml")
        recorded.evaluate = config.evaluate
        save_config(recorded, folder / "config.yaml")
    return missing


def _open(config: DictConfig, overwrite: bool, held: ExitStack) -> RunTarget:
    target = open_run(config, held, overwrite=overwrite)
    clear_failures(target.folder)
    return target


def _fit(config: DictConfig, force: bool) -> str:
    """How activations are to be kept or recomputed; `UsageError` where the plan says that a run needs more memory than
    there is, before time is spent."""
    asked = config.trainer.activation_checkpointing
    unplanned = ACTIVATION_CHECKPOINTING[-1] if asked == AUTO else asked
    memory = device_memory() // (1 if torch.cuda.is_available() else max(1, config.trainer.devices))
    try:
        run_plan = plan_run(config, memory_bytes=memory)
    except RuntimeError as error:  # as torch raises where code asks for the values of tensors that have none
        log.warning("The run's memory could not be planned (%s: %s)", type(error).__name__, error)
        return unplanned
    if run_plan.problems:
        raise UsageError("; ".join(run_plan.problems))
    if (found := problems(run_plan, memory)) and not force:
        raise UsageError(f"This run cannot work: {'; '.join(found)}. --force starts it anyway.")
    chosen = run_plan.needs.setup.checkpointing if run_plan.needs else unplanned
    if asked == AUTO:
        log.info("Activations recomputed in the backward pass: %s", chosen)
    return chosen
