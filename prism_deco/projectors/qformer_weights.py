"""Initialises a Q-Former from a BLIP-2 checkpoint."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from prism_deco.errors import UsageError
from prism_deco.tensors import SUFFIXES, open_tensors, tensor_files

log = logging.getLogger(__name__)

# LAVIS's and transformers' key names -> the projector's, applied one after the other.
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


def load_qformer(projector: nn.Module, path: Path) -> dict[str, str]:
    """Copies the Q-Former of a BLIP-2 checkpoint into `projector`, in place.

    Query tokens keep their initialisation if their number differs, and so do keys and values if the patch width
    differs. Everything else must be present and fit.

    Returns:
        The parameters that kept their initialisation, with the reason, except for the readout, which always does.

    Raises:
        UsageError: no checkpoint at `path`, no Q-Former in it, or one of other dimensions.
    """
    found: dict[str, Tensor] = {}
    unused = 0  # Q-Former tensors without a counterpart: text layers, deeper layers, heads
    wanted = {name: tensor for name, tensor in projector.state_dict().items() if _OURS.match(name)}
    files = tensor_files(path)
    if not files:
        raise UsageError(f"{path}: expected a checkpoint file, or a folder with one of {', '.join(SUFFIXES)}.")
    for file in files:
        tensors = open_tensors(file)  # those of the tower are not read
        for key in tensors:
            name = key
            for pattern, replacement in _RENAMES:
                name = re.sub(pattern, replacement, name)
            if name in wanted:
                found[name] = tensors[key]
            elif _OURS.match(name) or key.startswith("Qformer."):
                unused += 1
    if not any(name.startswith("body.") for name in found):
        raise UsageError(f"{path} holds no Q-Former: expected keys such as Qformer.bert.encoder.layer.0.* (LAVIS).")

    reinitialised = {}
    for name, tensor in wanted.items():
        if name in found and found[name].shape == tensor.shape:
            continue
        theirs = list(found[name].shape) if name in found else "absent"
        reason = f"checkpoint {theirs}, here {list(tensor.shape)}"
        if not _FREE.search(name):
            raise UsageError(f"{path} does not fit: {name}: {reason}. Change depth, hidden_dim or ffn_dim.")
        reinitialised[name] = reason
        # A bias is useless without its weight.
        bias = re.sub(r"weight$", "bias", name)
        if bias in wanted and bias not in reinitialised:
            reinitialised[bias] = f"belongs to {name}"
    taken = wanted.keys() - reinitialised.keys()
    with torch.no_grad():
        for name in taken:
            # Tensors of a state dict share memory with the parameters.
            wanted[name].copy_(found[name])
    log.info("%s: %d tensors taken, %d unused", path, len(taken), unused)
    for name, reason in reinitialised.items():
        log.info("  re-initialised %s: %s", name, reason)
    return reinitialised
