"""How much memory a relevance call takes, said before it takes it, and how many targets go at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from prism_deco.errors import UsageError

log = logging.getLogger(__name__)

# Share of the free memory that a call plans to use: other processes, and what the estimate misses.
_SHARE = 0.7


@dataclass(frozen=True)
class Plan:
    """Estimated bytes of one call, beyond the weights.

    Attributes:
        graph: the forward pass with all attention probabilities, kept for the backward passes.
        per_target: what each target of one batched backward adds.
        chunk: targets in one batched backward.
    """

    graph: int
    per_target: int
    chunk: int

    @property
    def peak(self) -> int:
        return self.graph + self.chunk * self.per_target


def plan(
    config: PretrainedConfig, length: int, targets: int, dtype: torch.dtype, device: torch.device, chunk: int | None
) -> Plan:
    """Estimates a call and chooses its chunk.

    Args:
        config: of the language model.
        length: positions n, image included.
        targets: answer tokens T.
        chunk: targets at once; None takes as many as fit into the free memory.

    Raises:
        UsageError: not even one target at a time fits.
    """
    size = torch.finfo(dtype).bits // 8
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", 4 * width)
    maps = config.num_attention_heads * length * length
    # The softmax is in float32 at least, and cast afterwards: two copies where the types differ.
    kept = max(size, 4) + (size if size < 4 else 0)
    graph = layers * (maps * kept + length * (12 * width + 4 * inner) * size) + 3 * maps * max(size, 4)
    graph += graph // 4  # measured peaks lay up to an eighth above the sum of what is known to be kept
    # One layer at a time: gradients of the map, of the scores, and their weighed product.
    per_target = maps * (3 * size + 2 * max(size, 4)) + length * (8 * width + 4 * inner) * size
    room = free_memory(device)
    if room is not None and room < graph + per_target:
        raise UsageError(
            f"Relevance over {length} positions needs about {_gb(graph + per_target)} beside the weights, and "
            f"{_gb(room)} are free on {device}. Use a smaller dtype (bfloat16), fewer visual tokens, a shorter text, "
            "or a larger device."
        )
    if chunk is None:
        chunk = targets if room is None else max(1, int(_SHARE * (room - graph)) // per_target)
    if chunk < 1:
        raise UsageError(f"chunk={chunk} is no number of targets: choose 1 or more.")
    made = Plan(graph, per_target, min(chunk, targets))
    log.info(
        "Relevance of %d tokens over %d positions: %d at a time, about %s beside the weights (%s free)",
        *(targets, length, made.chunk, _gb(made.peak), "unknown" if room is None else _gb(room)),
    )
    return made


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps estimates out of the log: one is enough for a set of similar examples."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return _linux_available() or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _linux_available() -> int | None:
    """What Linux can hand out, the file cache that it would drop included."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return found[0] * 1024 if found else None


def _gb(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
