"""Layers that several projectors share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism_deco.errors import UsageError


def build_mlp(
    in_dim: int,
    out_dim: int,
    depth: int,
    *,
    ratio: float | None = None,
    bias: bool = True,
    activation: type[nn.Module] = nn.GELU,
) -> nn.Sequential:
    """`depth` linear layers with an activation between them; GELU is the exact (erf) one.

    Args:
        out_dim: width of the output and of the hidden layers, except as `ratio` says.
        depth: number of linear layers. 2 is the MLP of LLaVA-1.5 and DeCo.
        ratio: width of the first hidden layer as a multiple of `in_dim`; None takes `out_dim`.
            `depth=3, ratio=4` is prismatic's fused MLP.

    Raises:
        UsageError: no layers, or a hidden width without a hidden layer.
    """
    if depth < 1:
        raise UsageError(f"An MLP of depth {depth} has no layers: choose a depth of at least 1.")
    if ratio is not None and depth < 2:
        raise UsageError(f"mlp_ratio={ratio} needs a hidden layer, and an MLP of depth 1 has none: use depth 2 or 3.")
    # Of the input and of each layer's output.
    widths = [in_dim] + [out_dim] * depth
    if ratio is not None:
        widths[1] = round(ratio * in_dim)
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1], bias=bias)]
    for before, after in pairwise(widths[1:]):
        layers += [activation(), nn.Linear(before, after, bias=bias)]
    return nn.Sequential(*layers)


class GatedMLP(nn.Module):
    """SwiGLU without biases (arXiv 2002.05202), as in LLaMA: down(silu(gate(x)) * up(x))."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.gate = nn.Linear(in_dim, hidden_dim, bias=False)
        self.up = nn.Linear(in_dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in_dim] -> float[..., out_dim]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def init_normal(module: nn.Module) -> None:
    """Honeybee's initialisation, for `Module.apply`: weights of linear layers, convolutions and embeddings from
    N(0, 0.02), biases zero; norms keep their ones and zeros."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def check_init(init: str) -> None:
    """`UsageError` unless `init` is a known initialisation."""
    if init not in ("normal", "torch"):
        raise UsageError(f"init={init!r} is unknown: choose normal or torch.")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disables `torch.autocast` on a device."""
    # Devices without autocast (meta) reject even `enabled=False`.
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
