"""The layers of a language model, whatever its architecture calls them."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from prism_deco.errors import UsageError


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The decoder layers of a causal LM of transformers, in order; `UsageError` where there is no list of them."""
    depth = cast(Any, lm).config.num_hidden_layers
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise UsageError(
        f"{type(lm).__name__} has no list of {depth} decoder layers: it can be neither sharded nor planned."
    )
