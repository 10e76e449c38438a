"""The run's folder: whether a command line starts a run, goes on with one, or finds it done."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import default_run_id, is_free, read_config, save_config
from prism_deco.errors import UsageError
from prism_deco.training.checkpoints import CHECKPOINTS, newest_checkpoint, remove_leftovers
from prism_deco.training.status import THROUGH, read_status

log = logging.getLogger(__name__)

_CUT = ("recipe.micro_batch_size", "trainer.devices", "trainer.num_nodes")
"""How records fall into micro-batches: where the loss is a mean over these, what is learned depends on it."""

_LOCK = ".lock"


@dataclass(frozen=True)
class Plan:
    """What a command line amounts to.

    Attributes:
        folder: the run's folder.
        state: train, or one of `THROUGH`.
        checkpoint: where training goes on; None is its start.
    """

    folder: Path
    state: str = "train"
    checkpoint: Path | None = None


def run_folder(config: DictConfig) -> Path:
    """The run's folder; gives the run its name where it has none."""
    config.run_id = config.run_id or default_run_id(config)
    return Path(config.runs_dir) / config.run_id


def prepare_run(config: DictConfig, *, overwrite: bool = False) -> Plan:
    """Creates the run's folder with its `config.yaml`, or finds where the run in it stands.

    Raises:
        UsageError: the folder holds a run of another configuration, or something else.
    """
    folder = run_folder(config)
    if folder.exists() and overwrite:
        log.warning("Removing the earlier run in %s", folder)
        shutil.rmtree(folder)
    if holds_run(config):
        plan = _found(config, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(folder)
    if plan.state != "done":
        save_config(config, folder / "config.yaml")
        remove_leftovers(folder / CHECKPOINTS)
    return plan


def holds_run(config: DictConfig) -> bool:
    """Whether the run's folder holds this run already.

    Raises:
        UsageError: it holds a run of another configuration, or something else.
    """
    folder = run_folder(config)
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} exists and is no run (it has no config.yaml). Choose another run_id=NAME.")
    earlier, now = flat(read_config(folder / "config.yaml")), flat(config)
    differing = [key for key in sorted(earlier | now) if earlier.get(key) != now.get(key) and not is_free(key)]
    if differing:
        listed = "; ".join(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}" for key in differing[:5])
        raise UsageError(
            f"{folder} already holds a run of another configuration: {listed}{' ...' * (len(differing) > 5)}. "
            "Name this one run_id=NAME, or replace the earlier one with --overwrite."
        )
    return True


def _found(config: DictConfig, folder: Path) -> Plan:
    state = read_status(folder).get("state")
    if state in THROUGH:
        return Plan(folder, state)
    checkpoint = newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint and config.recipe.loss == "micro_batch_mean":
        earlier, now = flat(read_config(folder / "config.yaml")), flat(config)
        changed = [f"{key} was {earlier.get(key)} and is {now[key]}" for key in _CUT if earlier.get(key) != now[key]]
        if changed:
            log.warning("%s: the loss, a mean over micro-batches, is another from here on", ", ".join(changed))
    where = checkpoint.name if checkpoint else "its start: it has no checkpoint yet"
    log.info("%s holds this run, unfinished; training goes on from %s", folder, where)
    return Plan(folder, checkpoint=checkpoint)


def flat(config: DictConfig) -> dict[str, Any]:
    """The configuration as `group.key` -> value; lists stay whole."""

    def walk(content: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(content, dict) or not content:
            return {prefix: content}
        return {k: v for key, value in content.items() for k, v in walk(value, f"{prefix}.{key}").items()}

    content = json.loads(json.dumps(OmegaConf.to_container(config, resolve=True)))
    return {k: v for key, value in content.items() for k, v in walk(value, str(key)).items()}


def lock_run(folder: Path) -> TextIO | None:
    """Keeps other processes from training the same run for as long as the result stays open.

    Raises:
        UsageError: another process trains it.
    """
    file = (folder / _LOCK).open("a")
    try:
        # Not flock: loader processes would inherit that, and hold it for some seconds after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UsageError(f"{folder} is being trained by another process. Wait for it, or use run_id=NAME.") from error
    except OSError:
        file.close()  # a file system without locks
        return None
    return file
