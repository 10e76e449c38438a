"""One teacher-forced pass of a language model that records attention probabilities, and their gradients.

Shapes: L layers, H query heads (grouped keys are repeated), n positions, E embedding size, T targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_deco.llms.encoding import IGNORE
from prism_deco.llms.layers import decoder
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the weights, within the context."""
    # Only what changes is remembered: some parts may be frozen, or in evaluation mode, already.
    training = [part for part in module.modules() if part.training]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    module.requires_grad_(False)
    try:
        yield
    finally:
        for part in training:
            # Not `train()`, which would also switch the part's children.
            part.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def float32_weights(module: nn.Module) -> Iterator[None]:
    """Half-precision weights and buffers in float32, within the context: in bfloat16, products of many small
    derivatives lose their ranking."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    halves = [tensor for tensor in tensors if tensor.dtype.itemsize < 4]
    before = [tensor.data for tensor in halves]
    for tensor in halves:
        # Through `data`: modules keep the same parameters, and later get back the original bits.
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(halves, before, strict=True):
            tensor.data = data


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention within the context, as fused kernels return no probabilities."""
    before = cast(str, model.config._attn_implementation)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Recording:
    """A forward pass, as nodes of one autograd graph.

    Attributes:
        inputs: L tensors float[1, n, E]: the input of each layer; the first, the embeddings, is the leaf of the graph.
        attentions: L tensors float[1, H, n, n]: probabilities, rows are queries.
        logits: float[T], the logit of each target at the position that predicts it.
        positions: int64[T], those positions.
    """

    inputs: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    logits: Tensor
    positions: Tensor


def record(vlm: VLM, batch: Batch, visual: Tensor, targets: int) -> Recording:
    """Runs a batch of one sequence; the model must be `frozen` and have `eager_attention`.

    Args:
        visual: float[1, M, E], the image's visual tokens.
        targets: the first `targets` supervised tokens are the targets.
    """
    assert len(batch.input_ids) == 1
    # Labels are not shifted: position p predicts the label at p + 1.
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:targets, 0]
    tokens = batch.labels[0, positions + 1]
    embeddings = vlm.embed(batch, visual).detach().requires_grad_()
    body = decoder(vlm.lm)
    with torch.enable_grad():
        # One sequence of one round without padding: `turn_mask` makes no difference here.
        output = body(
            inputs_embeds=embeddings,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
        # Logits of the predicting positions, [T, V] -> that of each target alone, [T].
        logits = vlm.logits(output.last_hidden_state[0, positions]).gather(1, tokens[:, None])[:, 0]
    # The first hidden state is not the leaf in models that scale their embeddings; the last is the model's output.
    inputs = (embeddings, *output.hidden_states[1 : len(output.attentions)])
    return Recording(inputs, output.attentions, logits, positions)


def batched_gradients(outputs: Tensor, inputs: Sequence[Tensor], gradients: Tensor) -> tuple[Tensor, ...]:
    """Vector-Jacobian products for T vectors at once.

    Args:
        outputs: float[...], a node of the autograd graph.
        inputs: nodes it was computed from.
        gradients: float[T, ...], the vectors.

    Returns:
        float[T, ...] for each input; zeros if the outputs do not depend on it.
    """
    # The graph is retained, since callers traverse it again for other layers and other targets.
    taken: Any = torch.autograd.grad(
        outputs, list(inputs), gradients, retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    empty = (len(gradients),)
    return tuple(i.new_zeros(empty + i.shape) if g is None else g for g, i in zip(taken, inputs, strict=True))
