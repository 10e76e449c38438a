"""Recipes with several stages: one command line becomes one ordinary `prism-deco train` per stage.

A recipe's YAML lists its stages, each with its first arguments:

    stages:
      align: [recipe=llava_v1_5_align, data=llava_pretrain_558k]
      finetune: [recipe=llava_v1_5_finetune, data=llava_v1_5_mix665k]

The last stage is the run itself; the others are separate runs next to it (`<run_id>-align`). Each stage starts from the
previous one (`recipe.start_from`), and only the last one is scored. All are checked before the first one starts.
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
    """One run of a recipe: the arguments of its `prism-deco train`, and the configuration they compose."""

    name: str
    arguments: tuple[str, ...]
    config: DictConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.runs_dir) / self.config.run_id


def split(arguments: Sequence[str]) -> list[Stage]:
    """The stages of a command line, in order; empty if its recipe is a single run.

    An argument such as `align.recipe.lr=1e-4` applies only to the stage `align`, other arguments to all stages.
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
    """The configuration of a command line; if the recipe has stages, that of the last one."""
    stages = split(arguments)
    return stages[-1].config if stages else load_config(arguments)


def run(arguments: Sequence[str], options: Sequence[str] = ()) -> int:
    """Checks the stages of a command line, then trains them one after the other; returns the first non-zero exit code.

    Each stage runs in a process whose command line is that of a single run, since launchers repeat it for further
    ranks. A finished stage is not trained again.

    Args:
        options: of `prism-deco train`, for example `--overwrite`.
    """
    stages = split(arguments)
    train = [sys.executable, "-m", "prism_deco.cli", "train", *options]
    supervisor = _Supervisor()
    with taken_over((signal.SIGINT, *SIGNALS), supervisor.pass_on):
        # So that an error in the last stage does not show only after the hours of training before it.
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
    """The environment of a stage. Under a launcher, each stage gets a port of its own: torchrun's store still contains
    the keys of the previous stage, and under srun a fast rank could connect to the previous stage's store."""
    environment = dict(os.environ)
    if "TORCHELASTIC_RUN_ID" in environment:
        environment |= {"MASTER_PORT": str(int(environment["MASTER_PORT"]) + number)}
        return environment | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        first = environment.get("MASTER_PORT") or 15000 + int(environment["SLURM_JOB_ID"][-4:])  # as Lightning does
        return environment | {"MASTER_PORT": str(int(first) + number)}
    return environment


class _Supervisor:
    """Runs processes one at a time and forwards signals to them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs a command and returns its exit code; 128 + number if a signal killed it. Returns `PREEMPTED` if this
        process was asked to stop before the command ran or had installed its handlers."""
        if self._asked is not None:
            return PREEMPTED
        self._process = subprocess.Popen(command, env=environment)
        if self._asked is not None:
            self.pass_on(self._asked)  # the signal came while the process was being started
        code = self._process.wait()
        self._process = None
        if code < 0:
            return PREEMPTED if -code == self._asked in SIGNALS else 128 - code
        return code

    def pass_on(self, number: int, *_: object) -> None:
        """Handles a signal. Does not forward SIGINT: a terminal's Ctrl-C reaches the stage by itself."""
        self._asked = number
        if self._process is not None and number != signal.SIGINT:
            self._process.send_signal(number)
