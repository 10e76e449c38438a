"""Reads tensors from safetensors files and pickles, and writes safetensors one tensor at a time, so that neither a file
nor a sharded model is ever whole in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_deco.errors import UsageError
from prism_deco.files import inside

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".bin", ".pth", ".pt")
"""Suffixes of files with tensors, the safest format first."""

_WRAPPERS = ("state_dict", "model")
"""Keys under which training scripts store the weights, next to the optimizer's state."""

_BEGINNINGS = (b"PK", b"\x80", b"GGUF")
"""First bytes of files by `torch.save`, by `torch.save` before version 1.6, and by llama.cpp."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_HINT = "Fetch or write it again, or point at another file."


def open_safetensors(file: Path, hint: str = _HINT) -> Any:
    """Opens a file with `safetensors.safe_open`, which reads tensors one by one; `UsageError` if it is not readable.

    Args:
        hint: what the user can do about an unreadable file.
    """
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{file} cannot be read as safetensors ({error}): it is incomplete or damaged. {hint}"
        ) from error


def open_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Those of safetensors are memory-mapped and read on first use.

    Of a pickle, only tensors are returned; a state dict may be nested under `state_dict` or `model`.

    Raises:
        UsageError: the file is missing or damaged, or a pickle that would execute code.
    """
    if file.suffix != SAFETENSORS:
        return _unpickled(file)
    opened = open_safetensors(file)
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)


def check_tensor_file(file: Path) -> None:
    """`UsageError` if the first bytes of a file show that it has no weights, or a safetensors file is truncated."""
    if file.suffix == SAFETENSORS:
        open_safetensors(file)
        return
    if not file.is_file():
        raise UsageError(f"{file} is missing. {_HINT}")
    with file.open("rb") as opened:
        beginning = opened.read(4)
    if not beginning.startswith(_BEGINNINGS):
        raise UsageError(f"{file} has no weights: it is not a safetensors, .bin, .pth, .pt or .gguf file. {_HINT}")


def tensor_files(path: Path) -> list[Path]:
    """The files of a checkpoint: the file itself, the shards that an index lists, or a folder's files in the safest
    format. Does not check that they are readable.

    Args:
        path: a file, possibly split into shards, or a folder.

    Returns:
        Empty if there is none.
    """
    if path.is_file():
        return [path]
    if files := indexed_files(path):
        return files
    # The first suffix that any file has.
    return next((found for suffix in SUFFIXES if (found := sorted(path.glob(f"*{suffix}")))), [])


def indexed_files(path: Path) -> list[Path]:
    """The shards that an index lists, which may be missing; empty if there is no index.

    Args:
        path: a folder with a `*.index.json`, or the file that was split into shards.
    """
    # A file has nothing to glob: its index lies next to it.
    index = next(iter(sorted(path.glob("*.index.json"))), path.with_name(f"{path.name}.index.json"))
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} lists no shards: it is damaged or no weight index. Fetch it again.") from error
    return sorted(inside(index.parent, str(name), index) for name in names)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    # The sum needs no memory, but it may overflow although all elements are finite.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def is_adapter(name: str) -> bool:
    """Whether a tensor of a state dict belongs to a LoRA adapter (`llms.lora`)."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """The name of a weight in the model without adapters."""
    return name.replace(".base_layer.", ".")


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; gathers it if it is sharded (a DTensor), for which all ranks must call this."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def write_safetensors(
    path: Path | None,
    tensors: Mapping[str, Tensor],
    *,
    read: Callable[[Tensor], Tensor] = full,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes the same bytes as `safetensors.torch.save_file`, with only one tensor at a time in host memory.

    A thread computes the SHA-256 while the file is written. On an `OSError`, the incomplete file is removed.

    Args:
        path: the file; None calls `read` but writes nothing (for the other ranks of a `read` that gathers).
        tensors: by name, in the shapes and dtypes to write.
        read: returns the values of a tensor to write.

    Returns:
        The file's SHA-256; empty if nothing is written.
    """
    # safetensors' order: the widest types first, so that every tensor is aligned.
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
                # The tensor's bytes without a copy; hashing and writing release the GIL and overlap.
                content = value.reshape(-1).view(torch.uint8).numpy().data
                hashed = hasher.submit(digest.update, content)
                file.write(content)
                hashed.result()  # before the tensor is freed
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything, even an `AssertionError`
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UsageError(
            f"{file} cannot be read ({reason}): it is incomplete or damaged, or contains objects other than "
            "tensors, which are not unpickled. Fetch or write it again, or save its state dict as safetensors or with "
            "torch.save."
        ) from error
    # `model` may lie inside `state_dict`.
    for wrapper in _WRAPPERS:
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    if not isinstance(state, dict):
        raise UsageError(f"{file} contains a {type(state).__name__}, not a state dict.")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _header(order: Iterable[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # aligns the first tensor
    # The format: the length of the JSON header, the header, the tensors; `data_offsets` count from its end.
    return len(text).to_bytes(8, "little") + text
