"""Compares the projectors: parameters, arithmetic, time and memory of a forward and a backward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from prism_deco.bench.measure import Usage, activation_bytes, usage
from prism_deco.bench.result import BenchResult, BenchRow, interleaved, spread
from prism_deco.plan.flops import step_flops
from prism_deco.projectors import PROJECTORS, Projector, build_projector

log = logging.getLogger(__name__)

COLUMNS: dict[str, Callable[[BenchRow], str]] = {
    "dtype": lambda row: row.facts["dtype"],
    "tokens": lambda row: str(row.facts["num_tokens"]),
    "parameters": lambda row: f"{row.facts['params']:,}",
    "GFLOP forward": lambda row: f"{row.facts['forward_flops'] / 1e9:.2f}",
    "GFLOP total": lambda row: f"{row.facts['flops'] / 1e9:.2f}",
    "time, ms": lambda row: spread([1e3 * seconds for seconds in row.times()], 2),
    "activations, MiB": lambda row: f"{row.facts['activation_bytes'] / 2**20:.1f}",
}
CAPTION = (
    "GFLOP: matrix products and convolutions. Time: forward and backward, median ± interquartile range. Activations: "
    "tensors saved for the backward pass."
)


def bench_projectors(
    names: Sequence[str],
    *,
    in_dim: int,
    out_dim: int,
    in_grid: tuple[int, int],
    num_tokens: int,
    batch_size: int,
    dtypes: Sequence[str],
    device: torch.device,
    repeats: int,
) -> BenchResult:
    """Measures projectors in training mode with their default options. As with a frozen tower, the features need no
    gradient.

    Args:
        names: registered names; empty takes all.
        in_dim: channels of a patch feature.
        out_dim: embedding size of the LLM.
        in_grid: patch grid (height, width).
        num_tokens: visual tokens of the compressing projectors.
        batch_size: images per pass.
        dtypes: of weights and features: `float32` and/or `bfloat16`.
        repeats: timed passes of each projector, at least 2.
    """

    def build(name: str) -> Projector:
        tokens = num_tokens if PROJECTORS.get(name).compresses else None
        return build_projector(name, in_dim, out_dim, in_grid, tokens).train()

    rows = []
    patches = in_grid[0] * in_grid[1]
    for dtype in dtypes:
        of_type = {"device": device, "dtype": getattr(torch, dtype)}
        modules = {name: build(name).to(**of_type) for name in names or PROJECTORS.names()}
        features = torch.randn(batch_size, patches, in_dim, **of_type)
        log.info("Timing %s in %s on %s, %d passes each", ", ".join(modules), dtype, device, repeats)
        steps = {name: partial(_timed_step, module, features) for name, module in modules.items()}
        taken = interleaved(steps, repeats=repeats, warmup=2)
        for name, module in modules.items():
            # On the meta device nothing is computed, and the choice of kernels does not affect the count.
            with torch.device("meta"):
                forward_flops, flops = step_flops(build(name), torch.empty(batch_size, patches, in_dim))
            facts = {
                "dtype": dtype,
                "num_tokens": module.num_tokens,
                "params": sum(parameter.numel() for parameter in module.parameters()),
                "forward_flops": forward_flops,
                "flops": flops,
                "activation_bytes": activation_bytes(module, features),
            }
            rows.append(BenchRow(name, taken[name], facts))
    title = (
        f"Projectors, {patches} patches of {in_dim} -> {num_tokens} tokens of {out_dim}, batch {batch_size}, {device}"
    )
    return BenchResult(rows, title, CAPTION, COLUMNS)


def _timed_step(module: nn.Module, features: Tensor) -> Usage:
    """Times a forward pass, and a backward pass from the sum of its output."""
    with usage(features.device) as taken:
        module.zero_grad(set_to_none=True)
        module(features).sum().backward()
    return taken
