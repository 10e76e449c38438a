"""Estimates a relevance call's memory in advance: on a CPU there is no out-of-memory error to catch."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from prism_deco.errors import UsageError

# Fraction of the free memory to use; the rest is for other processes and errors of the estimate.
_USABLE = 0.7


def estimate(config: PretrainedConfig, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Estimated bytes of a relevance call, weights excluded.

    Args:
        config: of the language model.
        length: positions n, image included.
        dtype: of the activations.

    Returns:
        Bytes of the forward pass with all attention probabilities, and of each answer token in a batched backward pass.
    """
    size = dtype.itemsize
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", 4 * width)
    maps = config.num_attention_heads * length * length
    # The softmax runs in float32 or wider and is cast afterwards: two copies if the dtypes differ.
    kept = max(size, 4) + (size if size < 4 else 0)
    graph = layers * (maps * kept + length * (12 * width + 4 * inner) * size) + 3 * maps * max(size, 4)
    graph += graph // 4  # measured peaks were up to an eighth above the sum of the known tensors
    # One layer at a time: gradients of the map, of the scores, and their weighted product.
    per_token = maps * (3 * size + 2 * max(size, 4)) + length * (8 * width + 4 * inner) * size
    return graph, per_token


def tokens_at_once(config: PretrainedConfig, length: int, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many of the answer's tokens can share one batched backward pass.

    Args:
        config, length, dtype: see `estimate`.

    Raises:
        UsageError: not even one token at a time fits.
    """
    free = free_memory(device)
    if free is None:
        return tokens
    graph, per_token = estimate(config, length, dtype)
    # Refused only if it cannot fit at all; the margin `_USABLE` limits the tokens that share a pass.
    if free < graph + per_token:
        raise UsageError(
            f"Relevance over {length} positions needs about {(graph + per_token) / 2**30:.2f} GiB on top of the "
            f"weights, but only {free / 2**30:.2f} GiB are free on {device}. Use a smaller dtype (bfloat16), "
            "fewer visual tokens, a shorter text, or a larger device."
        )
    fitting = int(_USABLE * (free - graph)) // per_token
    return max(1, min(fitting, tokens))


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device; None where the system does not report them."""
    if device.type == "cuda":
        # Memory that torch's allocator holds without a tensor in it is available, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    memory = Path("/proc/meminfo")
    if device.type != "cpu" or not memory.is_file():
        return None
    # MemAvailable includes reclaimable file cache.
    (line,) = [line for line in memory.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable:")]
    return int(line.split()[1]) * 1024
