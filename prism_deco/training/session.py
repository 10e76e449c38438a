"""What `prism-deco train` does, from the processes it takes to the exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from omegaconf import DictConfig

from prism_deco.compose import build_model, group
from prism_deco.data import build_source
from prism_deco.llms.checkpointing import ACTIVATION_CHECKPOINTING
from prism_deco.llms.tuning import tuning
from prism_deco.plan import AUTO, plan_run, problems
from prism_deco.plan.accelerators import device_memory
from prism_deco.training.folder import Plan, holds_run, lock_run, prepare_run, run_folder
from prism_deco.training.module import TrainingModule
from prism_deco.training.preemption import Preemption
from prism_deco.training.ranks import Ranks
from prism_deco.training.run import strategy_of, train
from prism_deco.training.sharding import Sharding
from prism_deco.training.start import check_start, find_start
from prism_deco.training.status import THROUGH, read_status, set_status
from prism_deco.training.stops import Preempted, Stop
from prism_deco.training.watch import forget

log = logging.getLogger(__name__)


def run(
    config: DictConfig,
    score: Callable[[Path], None] | None,
    *,
    overwrite: bool = False,
    force: bool = False,
    arguments: Sequence[str] = (),
) -> int:
    """Trains and scores what the configuration says, or goes on with it where an earlier call has stopped.

    Args:
        score: scores a trained run; None leaves that out. All processes call it.
        overwrite: replace an earlier run in the folder.
        force: train even what does not fit this machine's memory by its plan.
        arguments: the command line, for the other processes of this machine.

    Returns:
        The exit code: 0 done, 75 preempted, 76 out of memory, 1 another failure.

    Raises:
        ValueError: wrong input.
    """
    ranks, preemption = Ranks(config.trainer), Preemption()
    try:
        with preemption.watched(), ranks.started(arguments), ExitStack() as held:
            run_folder(config)
            config.trainer.activation_checkpointing = ranks.decide(lambda: _fit(config, force))
            plan = ranks.decide(lambda: _prepare(config, overwrite, held))
            if plan.state == "done":
                log.info("The run in %s is done. Another one: run_id=NAME; in its place: --overwrite", plan.folder)
                return 0
            if plan.state == "train":
                train(config, plan, ranks, preemption)
            if preemption.requested:
                raise Preempted("made way before the scoring")
            if score is not None:
                score(plan.folder)
            if ranks.is_main:
                spent = {key: value for key, value in read_status(plan.folder).items() if key != "state"}
                set_status(plan.folder, "done", **spent)
            log.info("The run is in %s; watch it with: tensorboard --logdir %s", plan.folder, config.runs_dir)
            return 0
    except Stop as stop:
        if ranks.is_main:
            sys.stderr.write(f"prism-deco: {stop.state.replace('_', ' ')}: {' '.join(str(stop).split())}\n")
        return stop.exit_code


def check(config: DictConfig, *, after: DictConfig | None = None, overwrite: bool = False, force: bool = False) -> None:
    """Looks for what would stop a run, as far as that can be told without its weights and from its data's files alone;
    trains nothing. Nothing would stop a run that is through.

    Args:
        after: the run that this one starts from, if it is still to be trained.
        overwrite: an earlier run in the folder is to be replaced.
        force: do not mind what does not fit this machine's memory.

    Raises:
        ValueError: the folder holds another run, data are missing, parts do not fit together, or not this machine.
    """
    ranks = Ranks(config.trainer)
    if not overwrite and holds_run(config) and read_status(run_folder(config)).get("state") in THROUGH:
        return
    if after is not None:
        check_start(after, config)
    elif config.recipe.start_from:
        find_start(Path(config.recipe.start_from), config)
    vlm, _ = build_model(config, device="meta")
    tuning(config.recipe.lm).check()
    TrainingModule(vlm, config.recipe, total_steps=1, nonfinite=config.trainer.nonfinite)
    strategy_of(config, ranks)
    if config.trainer.strategy == "fsdp":
        Sharding.of(config.trainer, ranks.size)
    build_source(group(config, "data"))
    if ranks.is_main:  # it may index the data
        _fit(config, force)


def _prepare(config: DictConfig, overwrite: bool, held: ExitStack) -> Plan:
    folder = run_folder(config)
    if (folder / "config.yaml").is_file() and (lock := lock_run(folder)):
        lock.close()
    plan = prepare_run(config, overwrite=overwrite)
    if lock := lock_run(plan.folder):
        held.enter_context(lock)
    forget(plan.folder)
    return plan


def _fit(config: DictConfig, force: bool) -> str:
    """How activations are to be kept or recomputed; `ValueError` where the plan says that a run needs more memory than
    there is, before time is spent."""
    asked = config.trainer.activation_checkpointing
    unplanned = ACTIVATION_CHECKPOINTING[-1] if asked == AUTO else asked
    memory = device_memory() // (1 if torch.cuda.is_available() else max(1, config.trainer.devices))
    try:
        run_plan = plan_run(config, memory_bytes=memory)
    except Exception as error:  # a plug-in's code may not bear being walked through without data
        log.warning("The run's memory could not be planned (%s: %s)", type(error).__name__, error)
        return unplanned
    if (found := problems(run_plan, memory)) and not force:
        raise ValueError(f"This run cannot work: {'; '.join(found)}. --force starts it anyway.")
    chosen = run_plan.needs.setup.checkpointing if run_plan.needs else unplanned
    if asked == AUTO:
        log.info("Activations recomputed in the backward pass: %s", chosen)
    return chosen
