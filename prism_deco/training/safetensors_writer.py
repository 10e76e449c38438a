"""Writing safetensors one tensor at a time: neither a file nor a sharded model is ever whole in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a DTensor); all ranks must call it then."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def write_safetensors(
    path: Path | None,
    tensors: Mapping[str, Tensor],
    *,
    read: Callable[[Tensor], Tensor] = full,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes what `safetensors.torch.save_file` would, byte for byte, with one tensor at a time on the host.

    The SHA-256 is computed on the way, in a thread beside the disk.

    Args:
        path: the file; None reads the tensors and writes nothing (the other ranks of a gathering `read`).
        tensors: what to write; dtypes and shapes are those of the file.
        read: makes the values of a tensor out of its entry.

    Returns:
        The file's SHA-256; empty where nothing is written.

    Raises:
        OSError: the file cannot be written; what there is of it is removed.
    """
    # The order of safetensors: wide types first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    if path is None:
        for name in order:
            read(tensors[name])
        return ""
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
            header = _header(order, tensors, metadata or {})
            digest.update(header)
            file.write(header)
            for name in order:
                value = read(tensors[name]).detach().to("cpu").contiguous()
                content = value.reshape(-1).view(torch.uint8).numpy().data
                hashed = hasher.submit(digest.update, content)
                file.write(content)
                hashed.result()
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _header(order: Iterable[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
