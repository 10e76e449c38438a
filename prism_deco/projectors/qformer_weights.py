"""Starts a Q-Former from a BLIP-2 checkpoint, and says exactly what came from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

# Key names of LAVIS (first) and of transformers, rewritten to the projector's own, one after the other.
_RENAMES = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "body.layernorm."),
    (r"^Qformer\.bert\.(encoder\.layer\.\d+\.(?:cross)?attention)\.self\.", r"body.\1.attention."),
    (r"^Qformer\.bert\.encoder\.", "body.encoder."),
    (r"^qformer\.", "body."),
    (r"^(ln_vision|vision_model\.post_layernorm)\.", "input_norm."),
    (r"^query_tokens$", "queries"),
)
_OURS = re.compile(r"^(body\.|input_norm\.|queries$)")

# What may differ between a checkpoint and this module: the number of queries and the width of the patches.
_FREE = re.compile(r"^queries$|^input_norm\.|\.crossattention\.attention\.(key|value)\.")


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave to a projector."""

    source: str
    """The file or folder."""
    taken: tuple[str, ...]
    """Parameters of the projector that were read."""
    reinitialised: dict[str, str]
    """Parameters that kept their fresh initialisation, with the reason. (The readout always does.)"""
    unused: tuple[str, ...]
    """Q-Former keys of the checkpoint that have no place here: text layers, deeper layers, heads."""

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.taken)} tensors taken, {len(self.unused)} unused"]
        lines += [f"  re-initialised {name}: {reason}" for name, reason in self.reinitialised.items()]
        return "\n".join(lines)


def load_qformer(projector: nn.Module, path: Path) -> LoadReport:
    """Copies the Q-Former of a BLIP-2 checkpoint into `projector`, in place.

    Query tokens of another count and keys/values for patches of another width keep their fresh
    initialisation: neither has a meaning here. Anything else has to be there and to fit.

    Raises:
        ValueError: no checkpoint at `path`, no Q-Former in it, or one of another geometry.
    """
    found: dict[str, Tensor] = {}
    unused: list[str] = []
    wanted = {name: tensor for name, tensor in projector.state_dict().items() if _OURS.match(name)}
    for key, read in _tensors(path):
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in wanted:
            found[name] = read()
        elif _OURS.match(name) or key.startswith("Qformer."):
            unused.append(key)
    if not any(name.startswith("body.") for name in found):
        raise ValueError(f"{path} holds no Q-Former: expected keys such as Qformer.bert.encoder.layer.0.* (LAVIS).")

    reinitialised = {}
    for name, tensor in wanted.items():
        if name in found and found[name].shape == tensor.shape:
            continue
        theirs = list(found[name].shape) if name in found else "absent"
        reason = f"checkpoint {theirs}, here {list(tensor.shape)}"
        if not _FREE.search(name):
            raise ValueError(f"{path} does not fit: {name}: {reason}. Change depth, hidden_dim or ffn_dim.")
        reinitialised[name] = reason
        # A bias means nothing without its matrix.
        bias = re.sub(r"weight$", "bias", name)
        if bias in wanted and bias not in reinitialised:
            reinitialised[bias] = f"belongs to {name}"
    taken = tuple(name for name in wanted if name not in reinitialised)
    with torch.no_grad():
        for name in taken:
            wanted[name].copy_(found[name])
    return LoadReport(str(path), taken, reinitialised, tuple(sorted(unused)))


def _tensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each tensor of a checkpoint: its key, and a function that reads it (the tower's are never read)."""
    for file in _files(path):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                for key in content.keys():  # noqa: SIM118 (not a dict)
                    yield key, partial(content.get_tensor, key)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
            # LAVIS keeps the weights under "model", beside the state of its optimizer.
            for key, tensor in content.get("model", content).items():
                yield key, partial(Tensor.detach, tensor)


def _files(path: Path) -> list[Path]:
    """The checkpoint files at `path`; in a folder, those of the safest format that is there."""
    if path.is_file():
        return [path]
    for pattern in ("*.safetensors", "*.bin", "*.pth", "*.pt"):
        files = sorted(path.glob(pattern))
        if files:
            return files
    raise ValueError(f"{path}: expected a checkpoint file, or a folder with .safetensors, .bin, .pth or .pt files.")
