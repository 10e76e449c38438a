"""Checks a run for everything that would stop it, before its folder is touched and weights are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import DictConfig

from prism_deco.backbones.weights import ASSET, check_tower_weights
from prism_deco.build import build_model, group, max_positions
from prism_deco.config.registry import import_plugins
from prism_deco.data import build_source
from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.files import check_writable
from prism_deco.llms.build import check_llm_weights
from prism_deco.llms.isolation import check_isolation
from prism_deco.llms.spec import read_spec
from prism_deco.llms.tuning import quantization, tuning
from prism_deco.tensors import SUFFIXES, check_tensor_file, tensor_files
from prism_deco.training.board import read_loggers
from prism_deco.training.checkpoints import Checkpoint
from prism_deco.training.datamodule import Conversations
from prism_deco.training.init_from import check_start, find_start
from prism_deco.training.manifest import check_resume
from prism_deco.training.model_folder import verify_model
from prism_deco.training.run_dir import run_folder
from prism_deco.training.sharding import Sharding, strategy_of

log = logging.getLogger(__name__)

AUTO = "auto"


class Scoring(Protocol):
    """What to measure of a trained run."""

    def prepare(self, benchmarks: Path | None) -> None:
        """Raises `UsageError` if it cannot be measured; `benchmarks` is the folder of those that come with the data."""

    def missing(self, folder: Path) -> Scoring | None:
        """The part without results in the run's folder; None if all have results."""

    def __call__(self, folder: Path, world: World) -> None:
        """Measures; all processes call this."""


def check_all(
    config: DictConfig,
    world: World,
    *,
    scoring: Scoring | None = None,
    resume: Path | None = None,
    after: DictConfig | None = None,
    plans: bool = False,
    force: bool = False,
) -> Conversations:
    """Checks what can be checked without the model's weights; one process does so for all.

    Replaces the value `auto` of `trainer.activation_checkpointing`.

    Args:
        scoring: what to measure of the run, if anything.
        resume: the checkpoint that the run resumes from, if any.
        after: the configuration of the run that this one starts from, if that is not trained yet.
        plans: also make the checks that a run itself makes later: estimate the memory of a step, ask the hub for
            missing weights, and compare checksums.
        force: accept a run whose estimated memory exceeds this machine's.

    Returns:
        The data of the run.

    Raises:
        UsageError: files are missing or malformed, parts do not fit together, or the run does not fit this machine.
    """
    import_plugins(config.plugins)
    check_writable(run_folder(config), "Choose another folder: runs_dir=FOLDER.")
    for name in ("backbone", "llm", "projector"):
        _check_local_weights(name, config[name])
    source = build_source(group(config, "data"))
    if after is not None:
        check_start(after, config)
    elif config.recipe.start_from:
        start = find_start(Path(config.recipe.start_from), config)
        if plans:
            verify_model(start)
    strategy_of(config.trainer, world)
    read_loggers(config.trainer)
    if config.trainer.strategy == "fsdp":
        Sharding.of(config.trainer, world.size)
    vlm, llm = build_model(config, device="meta")
    if kind := tuning(config.recipe.lm).quantize:
        quantization(kind)
    if scoring is not None:
        scoring.prepare(source.benchmarks)
    data = Conversations(source, config, vlm, llm)
    if resume is not None:
        checkpoint = Checkpoint(resume)
        check_resume(checkpoint, config, llm, data)
        if plans:
            checkpoint.verify()
    data.check()
    recipe = config.recipe
    for key in ("tower_lr", "tower_layers"):
        if recipe.tower == "frozen" and recipe[key] is not None:
            log.warning("recipe.%s=%s has no effect: recipe.tower=frozen.", key, recipe[key])
    images = max(int(records.num_images.max(initial=0)) for records in (data.train_records, data.val_records))
    longest = min(recipe.max_text_tokens + images * vlm.projector.num_tokens, max_positions(config, llm))
    check_isolation(vlm.lm, packing=recipe.packing, turn_mask=recipe.turn_mask, longest=longest)
    if plans or config.trainer.activation_checkpointing == AUTO:
        config.trainer.activation_checkpointing = _plan_memory(config, force)
    if plans:
        check_tower_weights(group(config, "backbone"))
        check_llm_weights(read_spec(group(config, "llm")))
    return data


def _check_local_weights(name: str, part: DictConfig) -> None:
    path = part.get("weights") if part.get("pretrained", True) else None
    if not path or path.startswith(ASSET):
        return
    place = Path(path).expanduser()
    if not place.exists():
        raise UsageError(f"{name}.weights={path}: there is no such file or folder.")
    files = tensor_files(place)
    if not files:
        raise UsageError(f"{name}.weights={path}: the folder has no weights ({', '.join(SUFFIXES)}).")
    for file in files:
        check_tensor_file(file)


def _plan_memory(config: DictConfig, force: bool) -> str:
    """The setting of `trainer.activation_checkpointing` that fits the memory; `UsageError` if none does, unless
    `force` is set."""
    from prism_deco.plan import estimate_run, problems
    from prism_deco.plan.devices import device_memory

    asked = config.trainer.activation_checkpointing
    memory = device_memory() // (1 if torch.cuda.is_available() else max(1, config.trainer.devices))
    estimate = estimate_run(config, memory_bytes=memory)
    if estimate.problems:
        raise UsageError("; ".join(estimate.problems))
    found = problems(estimate, memory)
    if found and not force:
        raise UsageError(f"This run would fail: {'; '.join(found)}. Use --force to start it anyway.")
    if estimate.needs is None:
        log.warning("The run's memory %s", "; ".join(estimate.warnings))
    if asked != AUTO:
        return asked
    chosen = estimate.needs.setup.checkpointing if estimate.needs else "full"
    log.info("Activation checkpointing: %s", chosen)
    return chosen
