"""How much memory a relevance call needs, checked before it is taken: a CPU has no out-of-memory error to catch."""

from __future__ import annotations

import os

import torch
from transformers import PretrainedConfig

from prism_deco.errors import UsageError

# Fraction of the free memory that a call may plan with; other processes and the estimate's error take the rest.
_USABLE = 0.7


def estimate(config: PretrainedConfig, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Estimated bytes of a relevance call beside the weights.

    Args:
        config: of the language model.
        length: positions n, image included.
        dtype: of the activations.

    Returns:
        The forward pass with all attention probabilities, and what each answer token of a batched backward pass adds.
    """
    size = dtype.itemsize
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", 4 * width)
    maps = config.num_attention_heads * length * length
    # The softmax runs in float32 at least and is cast afterwards: two copies where the types differ.
    kept = max(size, 4) + (size if size < 4 else 0)
    graph = layers * (maps * kept + length * (12 * width + 4 * inner) * size) + 3 * maps * max(size, 4)
    graph += graph // 4  # measured peaks were up to an eighth above the sum of the known tensors
    # One layer at a time: gradients of the map, of the scores, and their weighted product.
    per_token = maps * (3 * size + 2 * max(size, 4)) + length * (8 * width + 4 * inner) * size
    return graph, per_token


def tokens_at_once(
    config: PretrainedConfig, length: int, tokens: int, dtype: torch.dtype, device: torch.device, chunk: int | None
) -> int:
    """How many answer tokens share one batched backward pass.

    Args:
        config, length, dtype: see `estimate`.
        tokens: answer tokens T.
        chunk: the number asked for; None takes as many as fit into the free memory.

    Raises:
        UsageError: not even one token at a time fits.
    """
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk={chunk} must be 1 or more.")
    graph, per_token = estimate(config, length, dtype)
    free = free_memory(device)
    if free is not None and free < graph + per_token:
        raise UsageError(
            f"Relevance over {length} positions needs about {_gib(graph + per_token)} beside the weights, but only "
            f"{_gib(free)} are free on {device}. Use a smaller dtype (bfloat16), fewer visual tokens, a shorter text, "
            "or a larger device."
        )
    if chunk is None:
        chunk = tokens if free is None else max(1, int(_USABLE * (free - graph)) // per_token)
    return min(chunk, tokens)


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device; None where the system does not report them."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return _linux_available() or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _linux_available() -> int | None:
    """Bytes that Linux can hand out, including the file cache that it would drop."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return found[0] * 1024 if found else None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
