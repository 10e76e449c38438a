"""A check that a model computes the records of a packed row, and rounds under `turn_mask=block`, independently.

Both features separate positions by the attention mask. Convolutions and recurrent states pass information on to later
positions regardless of any mask, and the mask of a packed row replaces that of a sliding window.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_deco.errors import UsageError
from prism_deco.llms.layers import decoder, decoder_layers
from prism_deco.llms.packed_attention import Segments, no_mask, use_packed_attention

TOLERANCE = 1e-4
"""Largest difference of hidden states relative to their maximum; float32 rounding stays far below it."""

_LENGTHS = (24, 9, 15)
_WINDOW = 8
_CPU = torch.device("cpu")


def check_isolation(lm: PreTrainedModel, *, packing: bool, turn_mask: str, longest: int) -> None:
    """Compares records in one row, and rounds under a block mask, with each computed alone.

    A copy of the first layers, with random float32 weights, computes a few short records on the CPU: this takes
    seconds for a model of any size. `lm` itself may be on any device, sharded, or without weights.

    Args:
        packing: whether the run packs records (`recipe.packing`); if so, `lm` is switched to packed attention.
        turn_mask: of the run (`recipe.turn_mask`).
        longest: maximum length of a record; attention windows of at least that length have no effect.

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
    if not difference <= TOLERANCE:
        kinds = getattr(lm.config, "layer_types", None) or ["of unknown types"]
        raise UsageError(
            f"{type(lm).__name__} does not compute the records or rounds of one row independently: hidden states "
            f"differ by {difference:.1e} of their maximum from those computed alone. Not all of its layers "
            f"({', '.join(sorted(set(kinds)))}) are plain causal attention. Set {way_out}."
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
    """float[1, L, E] of a shared prefix and two rounds in one row, and of each round alone after the prefix."""
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
    return decoder(lm)(use_cache=False, **inputs).last_hidden_state


def _first_layers(lm: PreTrainedModel, longest: int) -> PreTrainedModel:
    """The same architecture on the CPU with random weights, deep enough to contain every kind of layer.

    Attention windows shorter than `longest` are shortened further, below the length of the records compared here.
    """
    config = copy.deepcopy(lm.config)
    config._attn_implementation = "sdpa"
    config.initializer_range = 0.1  # large enough for a layer's output to matter next to the residual stream
    for name in ("sliding_window", "attention_chunk_size"):
        if (getattr(config, name, None) or longest) < longest:
            setattr(config, name, _WINDOW)
    with torch.device("meta"):
        small = type(lm)(config).eval()
    layers = decoder_layers(small)
    kinds = getattr(config, "layer_types", None) or [_kind(layer) for layer in layers]
    depth = max(kinds.index(kind) for kind in kinds) + 1
    del layers[depth:]
    body = decoder(small)
    table = small.get_input_embeddings()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in body.modules():
            if module is not table:  # not needed: the inputs are embeddings
                module.to_empty(device=_CPU, recurse=False)
        for tensor in (*body.parameters(), *body.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.1)
            else:
                tensor.zero_()
        body.apply(small._init_weights)
    return small


def _kind(layer: nn.Module) -> tuple[str, ...]:
    """The classes that a layer is made of."""
    return tuple(type(module).__name__ for module in layer.modules())
