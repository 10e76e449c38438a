"""A check that a model computes each record from its embeddings alone, independently of the rest of the batch.

Padding, packed rows and `turn_mask=block` separate positions by the attention mask. Convolutions and recurrent states
ignore that mask and pass information on to later positions, and the mask of a packed row replaces that of a sliding
window. Rotary frequencies may depend on the longest record of a batch. Some models use token ids for more than looking
up embeddings, but visual tokens have no ids.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from prism_deco.errors import UsageError
from prism_deco.llms.layers import decoder, decoder_layers
from prism_deco.llms.packed_attention import Segments, no_mask, use_packed_attention

TOLERANCE = 1e-4
"""Largest allowed difference of hidden states relative to their maximum; float32 rounding stays far below it."""

_LENGTHS = (24, 9, 15)
_WINDOW = 8
_ROPE_KEY, _ROPE_LIMIT = "original_max_position_embeddings", 12  # two of the lengths are above, one is below
_TOKENS = 16
_ANSWER = 3
_CPU = torch.device("cpu")


def check_isolation(lm: PreTrainedModel, *, packing: bool, turn_mask: str, longest: int) -> None:
    """Checks that padded records, records packed into one row and rounds under a block mask give the same results as
    computed alone, embeddings the same as token ids, and generation the same with and without a cache.

    A copy of the first layers, with random float32 weights and a small vocabulary, computes a few short records on the
    CPU, which takes seconds for a model of any size. `lm` itself may be on any device, sharded, or without weights.

    Args:
        packing: `recipe.packing`; if true, `lm` is switched to packed attention.
        turn_mask: `recipe.turn_mask`.
        longest: maximum length of a record, beyond which attention windows and rotary limits have no effect.

    Raises:
        UsageError: the results differ.
    """
    if packing:
        use_packed_attention(lm)
    small, limit = _first_layers(lm, longest)
    if limit is not None:
        chosen = "chooses its rotary frequencies by the longest record of a batch"
        _compare(small, partial(_padded, "right"), chosen, f"Set recipe.max_positions={limit}")
    apart = "does not compute the records or rounds of one row independently"
    if turn_mask == "block":
        _compare(small, _block_masked, apart, "Set recipe.turn_mask=causal")
    if packing:
        _compare(small, _packed, apart, "Set recipe.packing=false")
    _compare(small, _embedded, "uses token ids for more than their embeddings, and images have no token ids")
    _compare(small, partial(_padded, "right"), "gives different results for records padded on the right")
    _compare(small, partial(_padded, "left"), "gives different results for records padded on the left")
    _compare(small, _cached, "gives different results with a cache than without")


def _compare(lm: PreTrainedModel, compute: Any, problem: str, hint: str = "Choose another llm") -> None:
    width = cast(nn.Embedding, lm.get_input_embeddings()).embedding_dim
    generator = torch.Generator().manual_seed(0)
    records = [torch.randn(1, length, width, generator=generator) for length in _LENGTHS]
    try:
        with torch.no_grad():
            found, wanted = compute(lm, records)
    except UsageError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{type(lm).__name__} cannot be used with images: {error}. {hint}.") from error
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE:
        kinds = getattr(lm.config, "layer_types", None) or ["of unknown types"]
        raise UsageError(
            f"{type(lm).__name__} {problem}: the results differ by {difference:.1e} of their maximum. Its layers are "
            f"{', '.join(sorted(set(kinds)))}. {hint}."
        )


def _embedded(lm: PreTrainedModel, _: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float[1, L, E] computed from embeddings, and from their token ids."""
    tokens = torch.arange(_TOKENS)[None]
    return _hidden(lm, inputs_embeds=lm.get_input_embeddings()(tokens)), _hidden(lm, input_ids=tokens)


def _padded(side: str, lm: PreTrainedModel, records: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float[1, L, E] of the records, padded on the right as in training or on the left as in evaluation, and of each
    alone."""
    if side == "right":
        inputs: dict[str, Any] = {"inputs_embeds": pad_sequence([record[0] for record in records], batch_first=True)}
    else:
        inputs = _on_the_left(records)
    kept = []
    for row, length in zip(_hidden(lm, **inputs), _LENGTHS, strict=True):
        kept.append(row[:length] if side == "right" else row[-length:])
    return torch.cat(kept)[None], _alone(lm, records)


def _cached(lm: PreTrainedModel, records: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float[B, tokens, V] of greedy answers to padded prompts, with a cache and in one forward pass without."""
    given = _on_the_left(records)
    prompts = {"inputs_embeds": given["inputs_embeds"], "attention_mask": given["attention_mask"].long()}
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    output = cast(Any, lm).generate(**prompts, **options, max_new_tokens=_ANSWER)
    answers = lm.get_input_embeddings()(output.sequences[:, : _ANSWER - 1])
    whole = _on_the_left([torch.cat(pair, dim=1) for pair in zip(records, answers[:, None], strict=True)])
    return torch.stack(output.logits, dim=1), lm(**whole, use_cache=False).logits[:, -_ANSWER:]


def _on_the_left(records: list[Tensor]) -> dict[str, Tensor]:
    """One batch of records float[1, L, E], padded on the left."""
    rows = pad_sequence([record[0] for record in records], batch_first=True, padding_side="left")
    positions = torch.stack([torch.arange(rows.shape[1]) - rows.shape[1] + record.shape[1] for record in records])
    return {"inputs_embeds": rows, "attention_mask": positions >= 0, "position_ids": positions.clamp(min=0)}


def _packed(lm: PreTrainedModel, records: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float[1, L, E] of all records in one row, and of each alone."""
    alone = _alone(lm, records)
    use_packed_attention(lm)
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    together = _hidden(
        lm,
        inputs_embeds=torch.cat(records, dim=1),
        position_ids=positions,
        attention_mask=no_mask(_CPU),
        segments=Segments.of(_LENGTHS, _CPU),
    )
    return together, alone


def _block_masked(lm: PreTrainedModel, records: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float[1, L, E] of a shared prefix and two rounds in one row, and of each round alone after the prefix."""
    prefix, *rounds = records
    shared = prefix.shape[1]
    alone = [_hidden(lm, inputs_embeds=torch.cat([prefix, each], dim=1)) for each in rounds]
    owner = torch.repeat_interleave(torch.arange(len(records)), torch.tensor(_LENGTHS))
    # Every position sees the prefix and its own round.
    sees = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
    positions = [torch.arange(shared), *(shared + torch.arange(each.shape[1]) for each in rounds)]
    together = _hidden(
        lm,
        inputs_embeds=torch.cat(records, dim=1),
        position_ids=torch.cat(positions)[None],
        attention_mask=sees.tril()[None, None],
    )
    return together, torch.cat([alone[0], *(each[:, shared:] for each in alone[1:])], dim=1)


def _alone(lm: PreTrainedModel, records: list[Tensor]) -> Tensor:
    """float[1, L, E] of each record computed alone, one after another."""
    return torch.cat([_hidden(lm, inputs_embeds=record) for record in records], dim=1)


def _hidden(lm: PreTrainedModel, **inputs: Any) -> Tensor:
    return decoder(lm)(use_cache=False, **inputs).last_hidden_state


def _first_layers(lm: PreTrainedModel, longest: int) -> tuple[PreTrainedModel, int | None]:
    """The same architecture on the CPU with random weights, deep enough to contain every kind of layer; and the length
    above which its rotary frequencies change, None if no record is that long.

    Attention windows and rotary limits below `longest` are lowered further, so that `_compare`'s records exceed them.
    """
    config = copy.deepcopy(lm.config)
    # Flash attention needs a GPU. Not every architecture has SDPA.
    is_eager = config._attn_implementation == "eager" or not lm._supports_sdpa
    config._attn_implementation = "eager" if is_eager else "sdpa"
    config.initializer_range = 0.1  # large enough for a layer's output to matter next to the residual stream
    for name in ("sliding_window", "attention_chunk_size"):
        if (getattr(config, name, None) or longest) < longest:
            setattr(config, name, _WINDOW)
    limits = []
    ropes = getattr(config, "rope_parameters", None) or {}
    for settings in (vars(config), ropes, *ropes.values()):  # `rope_parameters` may be nested by layer type
        if not isinstance(settings, dict) or settings.get("rope_type", "longrope") != "longrope":
            continue  # the frequencies of other types do not depend on the batch
        if (settings.get(_ROPE_KEY) or longest) < longest:
            limits.append(settings[_ROPE_KEY])
            settings[_ROPE_KEY] = _ROPE_LIMIT
    for name in vars(config).copy():
        if name.startswith("vocab_size"):
            setattr(config, name, _TOKENS)
        elif name.endswith("_token_id"):
            vars(config)[name] = None  # bypasses the validation of some configurations, which require a number
    with torch.device("meta"):
        small = type(lm)(config).eval()
    layers = decoder_layers(small)
    kinds = getattr(config, "layer_types", None) or [_kind(layer) for layer in layers]
    depth = max(kinds.index(kind) for kind in kinds) + 1
    del layers[depth:]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small.to_empty(device=_CPU)
        for tensor in (*small.parameters(), *small.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.1)
            else:
                tensor.zero_()
        body = cast(PreTrainedModel, decoder(small))
        body.apply(body._init_weights)
        for parameter in small.parameters():
            parameter += torch.randn_like(parameter) / 10  # a scale initialised to zero would hide its branch
    return small, min(limits, default=None)


def _kind(layer: nn.Module) -> tuple[str, ...]:
    """The classes of a layer's modules."""
    return tuple(type(module).__name__ for module in layer.modules())
