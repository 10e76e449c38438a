"""Compares the projectors: parameters, arithmetic, time and memory of a forward and a backward pass."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from prism_deco.bench.measure import memory_kind, step_memory, step_seconds
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.plan.flops import step_flops
from prism_deco.projectors import PROJECTORS, Projector, build_projector

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """What the projectors stand between; the defaults are CLIP ViT-L/14-336 and a 7B LLM."""

    in_dim: int = 1024
    """Channels of a patch feature."""
    out_dim: int = 4096
    """Embedding size of the LLM."""
    in_grid: tuple[int, int] = (24, 24)
    """Patch grid (height, width)."""
    num_tokens: int = 144
    """Visual tokens of the compressing projectors."""
    batch_size: int = 8
    """Images per pass."""


@dataclass(frozen=True)
class ProjectorRow:
    """One projector in one dtype."""

    projector: str
    """Registered name."""
    dtype: str
    """Of weights and features: float32 | bfloat16."""
    num_tokens: int
    """Visual tokens per image."""
    params: int
    """Number of parameters."""
    forward_flops: int
    """Floating-point operations of the forward pass of the batch: matrix products and convolutions."""
    flops: int
    """The same for forward and backward pass; features need no gradient, as the tower is frozen."""
    milliseconds: float
    """Median time of a forward and backward pass."""
    spread: float
    """Interquartile range of that time, milliseconds."""
    memory: int
    """Bytes; what of, `memory_kind` says."""


def bench_projectors(
    names: Sequence[str] | None = None,
    sizes: Sizes | None = None,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: torch.device | str = "cpu",
    repeats: int = 10,
    warmup: int = 2,
) -> list[ProjectorRow]:
    """Measures projectors in training mode with their default options.

    The repeats are interleaved (each round times every projector once), so that a machine that slows
    down meanwhile slows all of them.

    Args:
        names: registered names; None takes all.
        sizes: dimensions of the comparison.
        dtypes: `float32` and/or `bfloat16`.
        device: where to run.
        repeats: timed passes of each projector, at least 2.
        warmup: passes before them that are not timed.

    Raises:
        UsageError: unknown names or dtypes, too few repeats, or sizes a projector refuses.
    """
    sizes, device = sizes or Sizes(), torch.device(device)
    if repeats < 2:
        raise UsageError(f"repeats={repeats} shows no spread: use 2 or more.")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
    rows = []
    for dtype in dtypes:
        modules = {name: _build(name, sizes).to(device, DTYPES[dtype]) for name in names or PROJECTORS.names()}
        patches = sizes.in_grid[0] * sizes.in_grid[1]
        features = torch.randn(sizes.batch_size, patches, sizes.in_dim, device=device, dtype=DTYPES[dtype])
        log.info("Timing %s in %s on %s, %d passes each", ", ".join(modules), dtype, device, repeats)
        seconds: dict[str, list[float]] = {name: [] for name in modules}
        for repeat in range(-warmup, repeats):
            for name, module in modules.items():
                elapsed = step_seconds(module, features)
                if repeat >= 0:
                    seconds[name].append(elapsed)
        for name, module in modules.items():
            forward_flops, flops = _flops(name, sizes)
            lower, median, upper = statistics.quantiles(seconds[name], n=4, method="inclusive")
            rows.append(
                ProjectorRow(
                    projector=name,
                    dtype=dtype,
                    num_tokens=module.num_tokens,
                    params=sum(parameter.numel() for parameter in module.parameters()),
                    forward_flops=forward_flops,
                    flops=flops,
                    milliseconds=1e3 * median,
                    spread=1e3 * (upper - lower),
                    memory=step_memory(module, features),
                )
            )
    return rows


def render(rows: Sequence[ProjectorRow], sizes: Sizes, device: torch.device | str) -> Table:
    """The rows as a table; its title names the sizes, its caption what was counted."""
    (height, width), device = sizes.in_grid, torch.device(device)
    table = Table(
        title=f"Projectors, {height * width} patches of {sizes.in_dim} -> {sizes.num_tokens} tokens of "
        f"{sizes.out_dim}, batch {sizes.batch_size}, {device}",
        caption="GFLOP: matrix products and convolutions. Time: forward and backward, median ± interquartile range.",
    )
    table.add_column("projector")
    table.add_column("dtype")
    for header in ("tokens", "parameters", "GFLOP forward", "GFLOP total", "time, ms", f"{memory_kind(device)}, MiB"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.projector,
            row.dtype,
            str(row.num_tokens),
            f"{row.params:,}",
            f"{row.forward_flops / 1e9:.2f}",
            f"{row.flops / 1e9:.2f}",
            f"{row.milliseconds:.2f} ± {row.spread:.2f}",
            f"{row.memory / 2**20:.1f}",
        )
    return table


def _build(name: str, sizes: Sizes) -> Projector:
    num_tokens = sizes.num_tokens if PROJECTORS.get(name).compresses else None
    return build_projector(name, sizes.in_dim, sizes.out_dim, sizes.in_grid, num_tokens).train()


def _flops(name: str, sizes: Sizes) -> tuple[int, int]:
    # On the meta device nothing is computed, and the kernels a device happens to choose do not matter.
    with torch.device("meta"):
        features = torch.empty(sizes.batch_size, sizes.in_grid[0] * sizes.in_grid[1], sizes.in_dim)
        return step_flops(_build(name, sizes), features)
