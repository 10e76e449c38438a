"""Whether a model computes records of one packed row, and rounds under `turn_mask=block`, as if each stood alone.

Both rely on attention alone to keep positions apart. Convolutions and recurrent states carry something from one
position to the next whatever the attention does, and a mask of our own replaces that of a sliding window.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_deco.errors import UsageError
from prism_deco.llms.layers import decoder_layers
from prism_deco.llms.packed_attention import Segments, no_mask, use_packed_attention

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Difference of the hidden states, as a fraction of the largest: rounding in float32 stays far below it."""

_LENGTHS = (24, 9, 15)
_WINDOW = 8
_CPU = torch.device("cpu")


def check_isolation(lm: PreTrainedModel, *, packing: bool, turn_mask: str, longest: int) -> None:
    """Compares records in one row, and rounds under a block mask, with the same ones alone.

    It takes seconds for models of any size, and the weights do not matter: a copy of the first layers with random
    float32 weights computes a few short records on the CPU. `lm` may be on any device, be sharded, or have no weights.

    Args:
        packing: the run packs its records (`recipe.packing`); switches `lm` to packed attention.
        turn_mask: of the run (`recipe.turn_mask`).
        longest: most positions of a record; a window of that many positions or more is none.

    Raises:
        UsageError: the results differ.
    """
    if packing:
        use_packed_attention(lm)
        _compare(_first_layers(lm, longest), _packed, "recipe.packing=false")
    if turn_mask == "block":
        _compare(_first_layers(lm, longest), _block_masked, "recipe.turn_mask=causal")


def _compare(lm: PreTrainedModel, compute: Any, way_out: str) -> None:
    width = cast(nn.Embedding, lm.get_input_embeddings()).embedding_dim
    generator = torch.Generator().manual_seed(0)
    records = [torch.randn(1, length, width, generator=generator) for length in _LENGTHS]
    with torch.no_grad():
        together, alone = compute(lm, records)
    difference = float((together - alone).abs().max() / alone.abs().max())
    log.debug("%s: %s differs by %.1e", type(lm).__name__, compute.__name__, difference)
    if not difference <= TOLERANCE:
        kinds = getattr(lm.config, "layer_types", None) or ["unknown kind"]
        raise UsageError(
            f"{type(lm).__name__} does not keep the records or rounds of one row apart: its hidden states differ by "
            f"{difference:.1e} of their range from those of each alone. Its layers ({', '.join(sorted(set(kinds)))}) "
            f"are not all plain causal attention. Set {way_out}."
        )


def _packed(lm: PreTrainedModel, records: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float[1, L, E] of all records in one row, and of each alone."""
    alone = [_hidden(lm, inputs_embeds=record) for record in records]
    use_packed_attention(lm)
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    together = _hidden(
        lm,
        inputs_embeds=torch.cat(records, dim=1),
        position_ids=positions,
        attention_mask=no_mask(_CPU),
        segments=Segments.of(_LENGTHS, _CPU),
    )
    return together, torch.cat(alone, dim=1)


def _block_masked(lm: PreTrainedModel, records: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float[1, L, E] of a shared prefix and two rounds in one row, and of each round alone behind the prefix."""
    prefix, *rounds = records
    shared = prefix.shape[1]
    alone = [_hidden(lm, inputs_embeds=torch.cat([prefix, each], dim=1)) for each in rounds]
    owner = torch.repeat_interleave(torch.arange(len(records)), torch.tensor(_LENGTHS))
    sees = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
    positions = [torch.arange(shared), *(shared + torch.arange(each.shape[1]) for each in rounds)]
    together = _hidden(
        lm,
        inputs_embeds=torch.cat(records, dim=1),
        position_ids=torch.cat(positions)[None],
        attention_mask=sees.tril()[None, None],
    )
    return together, torch.cat([alone[0], *(each[:, shared:] for each in alone[1:])], dim=1)


def _hidden(lm: PreTrainedModel, **inputs: Any) -> Tensor:
    return cast(nn.Module, lm.base_model)(use_cache=False, **inputs).last_hidden_state


def _first_layers(lm: PreTrainedModel, longest: int) -> PreTrainedModel:
    """The same architecture on the CPU, as deep as it takes to have a layer of every kind, with random weights.

    Windows that records of `longest` positions exceed become short enough for the records compared here.
    """
    config = copy.deepcopy(lm.config)
    config._attn_implementation = "sdpa"
    config.initializer_range = 0.1  # what a layer adds stands out from what passes by it
    for name in ("sliding_window", "attention_chunk_size"):
        if (getattr(config, name, None) or longest) < longest:
            setattr(config, name, _WINDOW)
    with torch.device("meta"):
        small = type(lm)(config).eval()
    layers = decoder_layers(small)
    kinds = getattr(config, "layer_types", None) or [_kind(layer) for layer in layers]
    depth = max(kinds.index(kind) for kind in kinds) + 1
    del layers[depth:]
    decoder = cast(nn.Module, small.base_model)
    table = small.get_input_embeddings()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in decoder.modules():
            if module is not table:  # the inputs are embeddings
                module.to_empty(device=_CPU, recurse=False)
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.1)
            else:
                tensor.zero_()
        decoder.apply(small._init_weights)
    return small


def _kind(layer: nn.Module) -> tuple[str, ...]:
    """The classes that a layer is made of."""
    return tuple(type(module).__name__ for module in layer.modules())
