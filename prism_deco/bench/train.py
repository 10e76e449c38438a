"""Compares our training step with that of transformers' own LLaVA, on the same weights and records."""

from __future__ import annotations

import logging
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import AdamW

from prism_deco.bench.hf_llava import build_peer, peer_loss
from prism_deco.bench.measure import Usage, usage
from prism_deco.bench.records import build_batches, by_length, draw_pool
from prism_deco.bench.result import BenchResult, BenchRow, interleaved
from prism_deco.build import build_model
from prism_deco.errors import UsageError
from prism_deco.plan.flops import training_flops
from prism_deco.sequence import Batch
from prism_deco.training.compiling import compile_layers
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

OURS, PLAIN, GROUPED = "prism_deco", "transformers, padded", "transformers, grouped by length"

TOLERANCE = {False: 1e-4, True: 3e-2}
"""Largest relative difference of losses and gradients that counts as rounding, without and with bfloat16 autocast."""


@dataclass(frozen=True)
class StepVariant:
    """One implementation of the training step.

    Attributes:
        name: for tables.
        batches: one forward pass each; together they hold every record of the pool once.
        loss: maps a batch and its number of supervised tokens to their mean loss, float[].
    """

    name: str
    batches: Sequence[Batch]
    loss: Callable[[Batch, int], Tensor]


def bench_train(
    config: DictConfig,
    *,
    device: torch.device,
    batch_size: int = 8,
    steps: int = 4,
    rounds: int = 3,
    alone: bool = False,
) -> BenchResult:
    """Measures our step and transformers', after checking that both compute the same.

    Both run the same towers, and the same optimizer on the same parameters.

    Args:
        config: the model, always with random weights. Of the other keys only `recipe.packing`,
            `recipe.max_text_tokens`, `recipe.max_logits`, `trainer.precision` and, with `alone`, `trainer.compile`
            matter.
        batch_size: records per optimizer step, in one forward pass.
        steps: optimizer steps per round.
        rounds: timed rounds, at least 2.
        alone: compare both steps, but time ours only.

    Raises:
        UsageError: losses or gradients differ, too few rounds, or a model that transformers' class cannot hold.
    """
    if rounds < 2:
        raise UsageError(f"rounds={rounds} shows no spread: use 2 or more.")
    autocast = config.trainer.precision.startswith("bf16")
    vlm = random_model(config, device)
    variants = step_variants(config, vlm, batch_size=batch_size, steps=steps)
    agreement = compare_steps(vlm, variants[0], variants[1], autocast)
    vlm.train()
    if alone:
        variants = variants[:1]
        if config.trainer.compile:
            compile_layers(vlm)
    parameters = _trained(vlm)
    optimizer = AdamW(parameters, lr=1e-5, fused=True)

    def take_step(variant: StepVariant, batches: Iterator[Batch]) -> Usage:
        """The peak excludes weights, gradients and the optimizer's moments. Gradients are allocated within the step, so
        their size is subtracted."""
        with usage(device, memory=True) as taken:
            _loss(variant, next(batches), autocast).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if taken.peak is not None:
            taken.peak -= sum(p.grad.nbytes for p in parameters if p.grad is not None)
        optimizer.zero_grad(set_to_none=True)
        return taken

    log.info("Taking %d steps of %d records in %d ways on %s", rounds * steps, batch_size, len(variants), device)
    # `steps` steps in a row take every batch once, wherever the warm-up ended.
    takes = {variant.name: partial(take_step, variant, cycle(variant.batches)) for variant in variants}
    # torch.compile may compile for every batch's shape: the warm-up sees all of them.
    taken = interleaved(takes, repeats=rounds * steps, warmup=steps if alone else 1)
    rows = []
    for variant in variants:
        single = taken[variant.name]
        # Rounds are compared, not steps, since variants may group the records differently.
        by_round = [Usage.total(single[i : i + steps]) for i in range(0, len(single), steps)]
        rows.append(BenchRow(variant.name, by_round, _facts(variant, by_round)))
    about = _about(config, vlm, variants[0], batch_size, steps)
    return train_result(rows, about, agreement)


def random_model(config: DictConfig, device: torch.device) -> VLM:
    """The configured model with random weights."""
    torch.manual_seed(0)
    config = config.copy()
    config.backbone.pretrained = config.llm.pretrained = False
    return build_model(config, device=device)[0]


def step_variants(config: DictConfig, vlm: VLM, *, batch_size: int, steps: int) -> list[StepVariant]:
    """Our step, transformers' with the same batches padded, and transformers' with batches grouped by length."""
    recipe = config.recipe
    device = _trained(vlm)[0].device
    groups = draw_pool(vlm, batch_size=batch_size, steps=steps, max_text_tokens=recipe.max_text_tokens, seed=0)
    vlm.max_logits = recipe.max_logits
    peer = build_peer(vlm)

    def ours(batch: Batch, targets: int) -> Tensor:
        return vlm(batch).total / targets

    def theirs(batch: Batch, targets: int) -> Tensor:
        return peer_loss(peer, batch, targets)

    grouped = by_length(groups, vlm.projector.num_tokens)
    return [
        StepVariant(OURS, build_batches(vlm, groups, device, pack=recipe.packing), ours),
        StepVariant(PLAIN, build_batches(vlm, groups, device, pack=False), theirs),
        StepVariant(GROUPED, build_batches(vlm, grouped, device, pack=False), theirs),
    ]


def compare_steps(vlm: VLM, ours: StepVariant, peer: StepVariant, autocast: bool) -> dict[str, float]:
    """Relative differences of the two steps' losses and gradients on the first batch, without dropout.

    Raises:
        UsageError: they exceed `TOLERANCE`.
    """
    vlm.eval()
    losses, gradients = [], []
    for variant in (ours, peer):
        loss = _loss(variant, variant.batches[0], autocast)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([cast(Tensor, p.grad) for p in _trained(vlm)])
        vlm.zero_grad(set_to_none=True)
    # The norm of the gradients' difference relative to that of the peer's gradients.
    norm = nn.utils.get_total_norm
    difference = norm([a - b for a, b in zip(*gradients, strict=True)]) / norm(gradients[1])
    agreement = {"loss": abs(losses[0] / losses[1] - 1), "gradient": float(difference)}
    if max(agreement.values()) > TOLERANCE[autocast]:
        raise UsageError(f"The two steps disagree numerically ({agreement}), so their timings cannot be compared.")
    log.info("Losses differ by %.1e, gradients by %.1e of their norm", *agreement.values())
    return agreement


def _loss(variant: StepVariant, batch: Batch, autocast: bool) -> Tensor:
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=autocast):
        return variant.loss(batch, len(batch.targets))


def _trained(vlm: VLM) -> list[nn.Parameter]:
    return [parameter for parameter in vlm.parameters() if parameter.requires_grad]


def _facts(variant: StepVariant, rounds: Sequence[Usage]) -> dict[str, Any]:
    """The results of a variant, for its row."""
    median = statistics.median(taken.seconds for taken in rounds)
    positions = sum(batch.attention_mask.numel() for batch in variant.batches)
    return {
        "samples_per_s": sum(len(batch.ids) for batch in variant.batches) / median,
        "tokens_per_s": sum(len(batch.targets) for batch in variant.batches) / median,
        "peak": max((taken.peak for taken in rounds if taken.peak is not None), default=None),
        "padding": 1 - sum(int(batch.attention_mask.sum()) for batch in variant.batches) / positions,
    }


def _about(config: DictConfig, vlm: VLM, ours: StepVariant, batch_size: int, steps: int) -> dict[str, Any]:
    """Settings, versions and hardware of the measurement."""
    return {
        "hardware": hardware(ours.batches[0].input_ids.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backbone": config.backbone.name,
        "llm": config.llm.name,
        "architecture": OmegaConf.to_container(config.llm.architecture, resolve=True),
        "precision": config.trainer.precision,
        "visual_tokens": vlm.projector.num_tokens,
        "batch_size": batch_size,
        "steps": steps,
        "packing": config.recipe.packing,
        "max_text_tokens": config.recipe.max_text_tokens,
        "max_logits": config.recipe.max_logits,
        "flops_per_sample": _flops(config, vlm, ours.batches) / (batch_size * steps),
        "mean_length": sum(int(batch.attention_mask.sum()) for batch in ours.batches) / (batch_size * steps),
    }


def _flops(config: DictConfig, vlm: VLM, batches: Sequence[Batch]) -> float:
    """Floating-point operations of a step for each batch, without padding."""
    tokens = vlm.projector.num_tokens
    lengths: list[int] = []
    for batch in batches:
        # A packed row has several sequences; a padded row is one.
        lengths += batch.lengths or batch.attention_mask.sum(1).tolist()
    return training_flops(config).step(
        images=sum(int(batch.visual.sum()) for batch in batches) / tokens,
        positions=sum(lengths),
        pairs=sum(length**2 for length in lengths),
        targets=sum(len(batch.targets) for batch in batches),
    )


def hardware(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def train_result(rows: list[BenchRow], about: dict[str, Any], agreement: dict[str, float]) -> BenchResult:
    """Adds comparisons with transformers' rows to all rows, the first of which is ours, and lays out the table."""
    for row in rows:
        # A peer's own row includes its ratio to itself, 1.
        for peer in rows[1:]:
            row.facts[f"times {peer.name}"] = _times_faster(row, peer, "seconds")
            row.facts[f"times {peer.name}, processor"] = _times_faster(row, peer, "cpu_seconds")
            ours, theirs = row.facts["peak"], peer.facts["peak"]
            row.facts[f"memory of {peer.name}"] = ours / theirs if ours is not None and theirs else None
    shape = about["architecture"]
    title = (
        f"Training steps: {about['llm']} ({shape['hidden_size']} x {shape['num_hidden_layers']}, vocabulary "
        f"{shape['vocab_size']:,}), {about['visual_tokens']} visual tokens, batch {about['batch_size']}, "
        f"{about['precision']}, {about['hardware']}, {about['threads']} threads"
    )
    caption = (
        f"Losses differ by {agreement['loss']:.0e}, gradients by {agreement['gradient']:.0e}. Tokens: supervised. "
        "Times: how much faster, median of rounds timed side by side (least-largest), by the clock and, below, by "
        "processor time. MiB: peak of a step above weights, gradients and optimizer."
    )
    columns: dict[str, Callable[[BenchRow], str]] = {
        "samples/s": lambda row: f"{row.facts['samples_per_s']:.2f}",
        "tokens/s": lambda row: f"{row.facts['tokens_per_s']:.0f}",
        "padding": lambda row: f"{row.facts['padding']:.0%}",
        "times padded": lambda row: _ratios(row, PLAIN),
        "times grouped": lambda row: _ratios(row, GROUPED),
        "MiB": lambda row: "-" if row.facts["peak"] is None else f"{row.facts['peak'] / 2**20:.0f}",
        "of padded": lambda row: _share(row.facts[f"memory of {PLAIN}"]),
    }
    return BenchResult(rows, title, caption, columns, {"about": about, "agreement": agreement})


def _times_faster(row: BenchRow, peer: BenchRow, clock: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio over rounds timed side by side."""
    ratios = [theirs / ours for ours, theirs in zip(row.times(clock), peer.times(clock), strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _ratios(row: BenchRow, peer: str) -> str:
    both = (row.facts[f"times {peer}"], row.facts[f"times {peer}, processor"])
    return "\n".join(f"{median:.2f} ({least:.2f}-{largest:.2f})" for median, least, largest in both)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
