"""What one run will take, before it is started."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from omegaconf import DictConfig

from prism_deco.build import max_positions
from prism_deco.config.registry import import_plugins
from prism_deco.config.schema import ACTIVATION_CHECKPOINTING
from prism_deco.data.samplers import SAMPLERS, Population
from prism_deco.errors import UsageError
from prism_deco.plan.accelerators import GIB, accelerator
from prism_deco.plan.flops import training_flops
from prism_deco.plan.memory import FLOAT32, Memory, step_memory
from prism_deco.plan.meta_models import backbone_of, count, llm_of, projector_of
from prism_deco.plan.phases import Layout
from prism_deco.plan.sequences import Sequences, sequences_of
from prism_deco.plan.setup import Setup, setup_of

AUTO = "auto"

ROOM = 0.9
"""Share of a device's memory that `auto` plans to use: the allocator needs some for itself."""

DEFAULT_ACCELERATOR = "h100"
DEFAULT_MFU = 0.4


@dataclass(frozen=True)
class Needs:
    """What a run needs; bytes, tokens and floating-point operations.

    Attributes:
        parameters, trained: of the whole model.
        visual_in, visual_out: patches and visual tokens of an image.
        sequence: positions of a record on average, visual tokens included, after cutting.
        longest: positions of the longest forward pass.
        positions: the most that the LLM, or the recipe, allows.
        cut: share of the records whose text is cut; None where lengths are only estimated.
        records, steps: of the whole training.
        source: where the lengths come from (`Sequences.source`).
        memory: of one device.
        flops: of the whole training; validation and scoring are not part of it.
        hours: None where the accelerator's speed is not known.
        checkpoint: one checkpoint: trained weights in float32 and AdamW's moments.
        checkpoints_kept: the newest ones and the best.
    """

    parameters: int
    trained: int
    visual_in: int
    visual_out: int
    sequence: float
    longest: int
    positions: int
    cut: float | None
    records: int
    steps: int
    source: str
    setup: Setup
    memory: Memory
    flops: float
    hours: float | None
    checkpoint: int
    checkpoints_kept: int


@dataclass(frozen=True)
class Plan:
    """One run, planned.

    Attributes:
        name: the sweep's cell, or the choices.
        accelerator: kind of GPU; None is this machine's CPU.
        needs: None where the parts do not fit together at all.
        problems: why it cannot run, apart from memory (see `problems`).
        warnings: what is to be mended before it starts.
    """

    name: str
    accelerator: str | None
    needs: Needs | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_run(
    config: DictConfig,
    name: str = "",
    *,
    accelerator_name: str | None = None,
    mfu: float = DEFAULT_MFU,
    memory_bytes: int | None = None,
) -> Plan:
    """Plans a run without weights, data or a GPU.

    Args:
        name: what to call it; empty: the choices of backbone, projector and LLM.
        accelerator_name: one of `ACCELERATORS`; None is an H100, or no accelerator where the run is on a CPU.
        mfu: share of the accelerator's peak that the arithmetic reaches (model FLOPs utilisation).
        memory_bytes: of one device, by which `trainer.activation_checkpointing=auto` decides; None takes what the
            planned accelerator has, if there is one.

    Raises:
        UsageError: an unknown accelerator, or a share outside (0, 1].
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu={mfu} must be above 0 and at most 1.")
    name = name or " ".join(config[part].name for part in ("backbone", "projector", "llm"))
    setup = setup_of(config)
    kind = accelerator_name or (DEFAULT_ACCELERATOR if setup.cuda else None)
    peak = accelerator(kind).flops if kind else None
    import_plugins(config.plugins)
    if config.recipe.stages:
        stages = "; ".join(f"{stage}: {settings[0]}" for stage, settings in config.recipe.stages.items())
        return Plan(name, kind, None, (f"its recipe is made of stages, to be planned one by one ({stages})",), ())
    try:
        sequences, missing = sequences_of(config)
        if memory_bytes is None and kind:
            memory_bytes = accelerator(kind).memory
        needs = _least_recomputation(config, setup, sequences, peak and peak * mfu, memory_bytes)
    except UsageError as error:
        return Plan(name, kind, None, (str(error),), ())
    warnings = [missing] if missing else []
    return Plan(name, kind, needs, tuple(_batch_problems(config, setup)), tuple(warnings))


def problems(plan: Plan, memory_bytes: int | None = None) -> list[str]:
    """Why a planned run cannot work; empty where nothing speaks against it.

    Args:
        memory_bytes: of one device; None takes what the planned accelerator has, if there is one.
    """
    found = list(plan.problems)
    if memory_bytes is None and plan.accelerator:
        memory_bytes = accelerator(plan.accelerator).memory
    if plan.needs is not None and memory_bytes is not None and plan.needs.memory.peak > memory_bytes:
        memory = plan.needs.memory
        found.append(
            f"a step needs {memory.peak / GIB:.1f} GiB per device ({memory.when}), and there are "
            f"{memory_bytes / GIB:.1f}: lower recipe.micro_batch_size, recompute activations "
            "(trainer.activation_checkpointing=auto) or shard the model (trainer=fsdp)"
        )
    return found


def _least_recomputation(
    config: DictConfig, setup: Setup, sequences: Sequences, speed: float | None, memory_bytes: int | None
) -> Needs:
    """With as many activations recomputed as asked for; `auto` is the least that fits, or all."""
    policies = ACTIVATION_CHECKPOINTING if setup.checkpointing == AUTO else (setup.checkpointing,)
    for policy in policies:
        needs = _needs(config, replace(setup, checkpointing=policy), sequences, speed)
        if memory_bytes is None or needs.memory.peak <= ROOM * memory_bytes:
            break
    return needs


def _needs(config: DictConfig, setup: Setup, sequences: Sequences, speed: float | None) -> Needs:
    recipe = config.recipe
    backbone, llm, projector = backbone_of(config), llm_of(config), projector_of(config)
    visual, positions = projector.num_tokens, max_positions(config, llm)
    room = min(recipe.max_text_tokens, positions - visual)
    steps = math.ceil(sequences.records / recipe.global_batch_size) * recipe.epochs
    if recipe.max_steps is not None:
        steps = min(steps, recipe.max_steps)
    seen = min(steps * recipe.global_batch_size, sequences.records * recipe.epochs)
    images = sequences.images / sequences.records

    lengths = np.array([sequences.text]) if sequences.lengths is None else sequences.lengths
    lengths = np.minimum(lengths, room) + visual * images
    kept = (float(lengths.mean()) - visual * images) / sequences.text
    layout = _layout(config, setup, sequences, visual, room)
    costs = training_flops(config, layout.records, setup)
    flops = seen * costs.step(
        images=images,
        positions=float(lengths.mean()),
        pairs=float((lengths**2).mean()),
        targets=sequences.supervised * kept,
    )
    trained = count(projector, llm.model, trained=True)
    return Needs(
        parameters=count(backbone, projector, llm.model),
        trained=trained,
        visual_in=backbone.num_patches,
        visual_out=visual,
        sequence=float(lengths.mean()),
        longest=layout.length,
        positions=positions,
        cut=sequences.share_cut(room),
        records=sequences.records,
        steps=steps,
        source=sequences.source,
        setup=setup,
        memory=step_memory(config, setup, layout),
        flops=flops,
        hours=flops / speed / setup.devices / 3600 if speed else None,
        checkpoint=3 * FLOAT32 * trained,
        checkpoints_kept=config.trainer.keep_checkpoints + 1,
    )


def _layout(config: DictConfig, setup: Setup, sequences: Sequences, visual: int, room: int) -> Layout:
    """The forward pass that holds the longest record."""
    share = math.ceil(config.recipe.global_batch_size / setup.devices)
    records = min(config.recipe.micro_batch_size, share)
    text = min(sequences.longest_text, room)
    supervised = sequences.longest_supervised * text / sequences.longest_text
    return Layout(
        records=records,
        length=math.ceil(text) + visual,
        visual=visual,
        supervised=math.ceil(records * supervised),
        passes=math.ceil(share / records),
        packed=config.recipe.packing,
    )


def _batch_problems(config: DictConfig, setup: Setup) -> list[str]:
    """What the sampler says to that many devices."""
    one = Population(np.ones(1, dtype=int), np.ones(1, dtype=bool))
    try:
        SAMPLERS.get(config.recipe.sampler)(one, config.recipe.global_batch_size, 0, setup.devices)
    except UsageError as error:
        return [str(error)]
    return []
