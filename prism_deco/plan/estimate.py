"""Estimates what one run needs before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from omegaconf import DictConfig

from prism_deco.build import max_positions
from prism_deco.config.registry import import_plugins
from prism_deco.config.schema import ACTIVATION_CHECKPOINTING
from prism_deco.data.samplers import SAMPLERS, Population
from prism_deco.errors import UsageError
from prism_deco.llms.isolation import check_isolation
from prism_deco.plan.devices import GIB, Setup, accelerator, setup_of
from prism_deco.plan.fake_memory import PassShape
from prism_deco.plan.flops import training_flops
from prism_deco.plan.memory import FLOAT32, Memory, step_memory
from prism_deco.plan.meta_models import NeedsData, backbone_of, build_shallow, count, llm_key, llm_of, projector_of
from prism_deco.plan.sequences import Sequences, sequences_of
from prism_deco.projectors import Projector

ROOM = 0.9
"""Fraction of a device's memory that `auto` may use; the rest is for the allocator."""

DEFAULT_ACCELERATOR = "h100"


@dataclass(frozen=True)
class Needs:
    """What a run needs, in bytes, tokens and floating-point operations.

    Attributes:
        parameters, trained: parameters of the whole model, and the trained ones.
        visual_in, visual_out: patches and visual tokens per image.
        sequence: mean positions of a record after truncation, visual tokens included.
        longest: positions of the longest forward pass.
        positions: limit of the LLM or of the recipe.
        cut: fraction of the records whose text is truncated; None if lengths are only estimated.
        records: training records.
        steps: optimizer steps.
        source: where the lengths come from (`Sequences.source`).
        memory: of one device.
        flops: of the whole training, without validation and evaluation.
        hours: None if the accelerator's speed is unknown.
        checkpoint: size of one checkpoint: trained weights in float32 and AdamW's moments.
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
class RunEstimate:
    """The estimate of one run.

    Attributes:
        name: the sweep's cell, or the choices.
        accelerator: kind of GPU; None is this machine's CPU.
        needs: None if the parts do not fit together, or cannot run without data.
        problems: reasons why it would fail, except memory (see `problems`).
        warnings: what to fix before the start.
    """

    name: str
    accelerator: str | None
    needs: Needs | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def estimate_run(
    config: DictConfig,
    name: str = "",
    *,
    accelerator_name: str | None = None,
    mfu: float = 0.4,
    memory_bytes: int | None = None,
) -> RunEstimate:
    """Estimates a run without weights, data or a GPU.

    Args:
        name: of the estimate; empty takes the choices of backbone, projector and LLM.
        accelerator_name: one of `ACCELERATORS`; None is an H100, or no accelerator for a run on a CPU.
        mfu: model FLOPs utilisation, the fraction of the accelerator's peak.
        memory_bytes: of one device, for `trainer.activation_checkpointing=auto`; None takes the accelerator's, if there
            is one.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu={mfu} must be above 0 and at most 1.")
    name = name or " ".join(config[part].name for part in ("backbone", "projector", "llm"))
    setup = setup_of(config)
    kind = accelerator_name or (DEFAULT_ACCELERATOR if setup.cuda else None)
    device = accelerator(kind) if kind else None
    import_plugins(config.plugins)
    if config.recipe.stages:
        stages = "; ".join(f"{stage}: {settings[0]}" for stage, settings in config.recipe.stages.items())
        return RunEstimate(name, kind, None, (f"its recipe has stages: plan them one by one ({stages})",), ())
    if memory_bytes is None and device:
        memory_bytes = device.memory
    try:
        sequences, missing = sequences_of(config)
        needs = _needs(config, setup, sequences, memory_bytes)
    except UsageError as error:
        return RunEstimate(name, kind, None, (str(error),), ())
    except NeedsData as error:
        return RunEstimate(name, kind, None, (), (f"cannot be planned: {error}",))
    if device:
        needs = replace(needs, hours=needs.flops / (device.flops * mfu) / setup.devices / 3600)
    warnings = (missing,) if missing else ()
    found = _batch_problems(config, setup) + _row_problems(config, needs)
    return RunEstimate(name, kind, needs, tuple(found), warnings)


def problems(estimate: RunEstimate, memory_bytes: int | None = None) -> list[str]:
    """Reasons why a run would fail.

    Args:
        memory_bytes: of one device; None takes the accelerator's, if there is one.
    """
    found = list(estimate.problems)
    if memory_bytes is None and estimate.accelerator:
        memory_bytes = accelerator(estimate.accelerator).memory
    if estimate.needs is not None and memory_bytes is not None and estimate.needs.memory.peak > memory_bytes:
        memory = estimate.needs.memory
        found.append(
            f"a step needs {memory.peak / GIB:.1f} GiB per device ({memory.when}), which has "
            f"{memory_bytes / GIB:.1f}: lower recipe.micro_batch_size, recompute activations "
            "(trainer.activation_checkpointing=auto) or shard the model (trainer=fsdp)"
        )
    return found


def _needs(config: DictConfig, setup: Setup, sequences: Sequences, memory_bytes: int | None) -> Needs:
    recipe = config.recipe
    backbone, llm, projector = backbone_of(config), llm_of(config), projector_of(config)
    visual, positions = projector.num_tokens, max_positions(config, llm)
    # Text tokens that fit next to the visual tokens of one image.
    room = min(recipe.max_text_tokens, positions - visual)
    text = np.array([sequences.text]) if sequences.lengths is None else sequences.lengths
    images = sequences.images / sequences.records
    # float64[records] (or [1] with the mean only): positions after truncation, visual tokens included.
    lengths = np.minimum(text, room) + visual * images
    shape = _largest_pass(config, setup, sequences, room, projector)
    setup, memory = _least_recomputation(config, setup, shape, memory_bytes)
    trained = count(backbone, projector, llm.model, trained=True)
    steps = math.ceil(sequences.records / recipe.global_batch_size) * recipe.epochs
    steps = min(steps, recipe.max_steps or steps)
    # Records that pass through the model: an epoch's last batch may be short, and max_steps may end training early.
    seen = min(steps * recipe.global_batch_size, sequences.records * recipe.epochs)
    # A record passes once per scale; `lengths` has the visual tokens of the largest.
    flops = sum(
        _flops_per_record(config, sequences, lengths - (visual - scale) * images, scale) for scale in projector.scales
    )
    return Needs(
        parameters=count(backbone, projector, llm.model),
        trained=trained,
        visual_in=backbone.num_patches,
        visual_out=visual,
        sequence=float(lengths.mean()),
        longest=shape.length,
        positions=positions,
        cut=None if sequences.lengths is None else float(np.mean(sequences.lengths > room)),
        records=sequences.records,
        steps=steps,
        source=sequences.source,
        setup=setup,
        memory=memory,
        flops=seen * flops,
        hours=None,
        checkpoint=3 * FLOAT32 * trained,
        checkpoints_kept=config.trainer.keep_checkpoints + 1,
    )


def _largest_pass(config: DictConfig, setup: Setup, sequences: Sequences, room: int, projector: Projector) -> PassShape:
    """The forward pass with the longest record.

    Args:
        room: most text tokens of a sequence.
    """
    per_device = math.ceil(config.recipe.global_batch_size / setup.devices)
    records = min(config.recipe.micro_batch_size, per_device)
    text = min(sequences.longest_text, room)
    # Truncation is assumed to remove supervised tokens in proportion.
    supervised = sequences.longest_supervised * text / sequences.longest_text
    return PassShape(
        records=records,
        length=math.ceil(text) + projector.num_tokens,
        visual=projector.num_tokens,
        supervised=math.ceil(records * supervised),
        # A projector with several scales passes each micro-batch once per scale.
        passes=math.ceil(per_device / records) * len(projector.scales),
        packed=config.recipe.packing,
    )


def _least_recomputation(
    config: DictConfig, setup: Setup, shape: PassShape, memory_bytes: int | None
) -> tuple[Setup, Memory]:
    """The setup with the configured activation checkpointing, and its memory. `auto` becomes the policy with the least
    recomputation that fits, or else `full`."""
    policies = ACTIVATION_CHECKPOINTING if setup.checkpointing == "auto" else (setup.checkpointing,)
    # From the least recomputation to the most. If nothing fits, the last one stays.
    for policy in policies:
        chosen = replace(setup, checkpointing=policy)
        memory = step_memory(config, chosen, shape)
        if memory_bytes is None or memory.peak <= ROOM * memory_bytes:
            break
    return chosen, memory


def _flops_per_record(config: DictConfig, sequences: Sequences, lengths: np.ndarray, visual: int) -> float:
    images = sequences.images / sequences.records
    # The fraction of the text that is left after truncation.
    kept = (float(lengths.mean()) - visual * images) / sequences.text
    return training_flops(config).step(
        images=images,
        positions=float(lengths.mean()),
        # The mean of the squares: attention grows with each record's own length.
        pairs=float((lengths**2).mean()),
        targets=sequences.supervised * kept,
    )


def _batch_problems(config: DictConfig, setup: Setup) -> list[str]:
    """Why the sampler refuses this batch size or number of devices."""
    # Samplers refuse by batch size and number of devices, whatever the records, so one is enough.
    one = Population(np.ones(1, dtype=int), np.ones(1, dtype=bool))
    try:
        SAMPLERS.get(config.recipe.sampler)(one, config.recipe.global_batch_size, 0, setup.devices)
    except UsageError as error:
        return [str(error)]
    return []


def _row_problems(config: DictConfig, needs: Needs) -> list[str]:
    """Why training would refuse to isolate records or turns within one sequence (packing, block mask).

    The check takes seconds, so it is skipped if all layers have full attention; training repeats it anyway.
    """
    recipe, lm = config.recipe, llm_of(config).model.config
    longest = min(recipe.max_text_tokens + needs.visual_out, needs.positions)
    # As far as its configuration tells, every layer attends to all positions, without a window shorter than the
    # longest record.
    is_whole = set(getattr(lm, "layer_types", None) or ()) <= {"full_attention"}
    is_whole &= (getattr(lm, "sliding_window", None) or longest) >= longest and lm._attn_implementation != "eager"
    if is_whole or not (recipe.packing or recipe.turn_mask == "block"):
        return []
    return _isolation_problems(llm_key(config), lm.num_hidden_layers, recipe.packing, recipe.turn_mask, longest)


@lru_cache(maxsize=16)
def _isolation_problems(key: str, depth: int, packing: bool, turn_mask: str, longest: int) -> list[str]:
    try:
        check_isolation(build_shallow(key, depth), packing=packing, turn_mask=turn_mask, longest=longest)
    except UsageError as error:
        return [str(error)]
    return []
