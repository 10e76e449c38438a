"""Recipes of several stages: one command line becomes one ordinary `prism-deco train` per stage.

A recipe's YAML lists its stages, each with what its command line begins with:

    stages:
      align: [recipe=llava_v1_5_align, data=llava_pretrain_558k]
      finetune: [recipe=llava_v1_5_finetune, data=llava_v1_5_mix665k]

The last stage is the run itself; the others are runs beside it (`<run_id>-align`). Each starts from the one before
(`recipe.start_from`), and is scored only if it is the last. All are checked before the first one starts.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from prism_deco.config import default_run_id, load_choice, load_config, named_choice
from prism_deco.errors import UsageError
from prism_deco.exits import PREEMPTED, SIGNALS, taken_over

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One run of a recipe: the arguments of its `prism-deco train`, and what they compose to."""

    name: str
    arguments: tuple[str, ...]
    config: DictConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.runs_dir) / self.config.run_id


def split(arguments: Sequence[str]) -> list[Stage]:
    """The stages of a command line, in order; none if its recipe is a single run.

    `align.recipe.lr=1e-4` addresses the stage `align`; other arguments concern all stages.

    Raises:
        UsageError: a stage whose configuration does not compose.
    """
    choice = named_choice("recipe", arguments)
    recipe = load_choice("recipe", choice) if choice else {}
    declared: dict[str, list[str]] = recipe.get("stages") or {}
    if not declared:
        return []
    for_all: list[str] = []
    for_stage: dict[str, list[str]] = {name: [] for name in declared}
    for argument in arguments:
        stage, _, rest = argument.partition(".")
        if stage in declared:
            for_stage[stage].append(rest)
        elif not argument.startswith("recipe="):
            for_all.append(argument)

    *_, last = declared
    # The last stage is the run itself: the others are named after it.
    final = _compose(last, [*declared[last], *for_all, *for_stage[last]])
    final.recipe.name = recipe["name"]
    run_id = final.run_id or default_run_id(final)
    for_all = [argument for argument in for_all if not argument.startswith("run_id=")]

    stages: list[Stage] = []
    for name, settings in declared.items():
        given = [*settings]
        if stages:
            given.append(f"recipe.start_from={stages[-1].folder}")
        given += for_all
        if name == last:
            given.append(f"run_id={run_id}")
        else:
            given += [f"run_id={run_id}-{name}", "evaluate.benchmarks=null", "evaluate.relevance=null"]
        given += for_stage[name]
        stages.append(Stage(name, tuple(given), _compose(name, given)))
    return stages


def final_config(arguments: Sequence[str]) -> DictConfig:
    """The configuration of a command line; of the last stage, where the recipe has stages."""
    stages = split(arguments)
    return stages[-1].config if stages else load_config(arguments)


def run(arguments: Sequence[str], options: Sequence[str] = ()) -> int:
    """Checks the stages of a command line, then trains them one after the other; returns the first exit code that is
    not 0.

    Each in a process of its own, since launchers of several ranks repeat the command line of their process: it must be
    that of one run. A stage that is finished says so and is left alone.

    Args:
        options: of `prism-deco train`, for example `--overwrite`.
    """
    stages = split(arguments)
    train = [sys.executable, "-m", "prism_deco.cli", "train", *options]
    supervisor = _Supervisor()
    with taken_over((signal.SIGINT, *SIGNALS), supervisor.pass_on):
        # What is wrong with the last stage must not wait for the hours of those before it.
        code = supervisor.run([*train, "--check", *arguments], os.environ)
        for number, stage in enumerate(stages, start=1):
            if code:
                break
            log.info("Stage %d of %d, %s, in %s", number, len(stages), stage.name, stage.folder)
            code = supervisor.run([*train, *stage.arguments], _environment(number))
    return code


def _compose(name: str, arguments: Sequence[str]) -> DictConfig:
    try:
        return load_config(arguments)
    except UsageError as error:
        raise UsageError(f"Stage {name}: {error}") from error


def _environment(number: int) -> dict[str, str]:
    """Where a launcher started the processes, every stage meets at a port of its own: torchrun's store still knows the
    stage before, and under srun a process that is ahead might find the first one there still."""
    environment = dict(os.environ)
    if "TORCHELASTIC_RUN_ID" in environment:
        environment |= {"MASTER_PORT": str(int(environment["MASTER_PORT"]) + number)}
        return environment | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        first = environment.get("MASTER_PORT") or 15000 + int(environment["SLURM_JOB_ID"][-4:])  # Lightning's own
        return environment | {"MASTER_PORT": str(int(first) + number)}
    return environment


class _Supervisor:
    """Runs processes one at a time, and passes on to them the signals that this process gets."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """The exit code, 128 + number where a signal killed the process; `PREEMPTED` where this one was asked to stop
        before there was a process, or before it could listen."""
        if self._asked is not None:
            return PREEMPTED
        self._process = subprocess.Popen(command, env=environment)
        if self._asked is not None:
            self.pass_on(self._asked)  # it came while the process was being made
        code = self._process.wait()
        self._process = None
        if code < 0:
            return PREEMPTED if -code == self._asked in SIGNALS else 128 - code
        return code

    def pass_on(self, number: int, *_: object) -> None:
        """Handles a signal. A terminal's Ctrl-C reaches the stage by itself."""
        self._asked = number
        if self._process is not None and number != signal.SIGINT:
            self._process.send_signal(number)
