"""Measures the memory of the parts of a training step by running the real modules on fake tensors.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes and lifetimes but no data: a step of a 7B model takes a
second on a laptop. Saved tensors, workspaces and lifetimes come from the code that training runs, so no architecture
needs formulas of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils
from transformers.integrations import moe

from prism_deco.backbones import VisionBackbone
from prism_deco.llms.layers import checkpoint_activations, decoder_layers
from prism_deco.loss import summed_cross_entropy
from prism_deco.plan.devices import Setup
from prism_deco.plan.meta_models import build_shallow, short_backbone, without_data
from prism_deco.plan.tensor_meter import CudaTypes, Phases, TensorMeter, to_fake
from prism_deco.projectors import Projector, build_projector
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM


@dataclass(frozen=True)
class PassShape:
    """The largest forward pass of one device.

    Attributes:
        records: sequences, with one image each.
        length: positions of each after padding, visual tokens included.
        visual: visual tokens per image.
        supervised: supervised positions of all sequences.
        passes: forward passes per optimizer step.
        packed: all sequences are packed into one row.
    """

    records: int
    length: int
    visual: int
    supervised: int
    passes: int
    packed: bool = False


@lru_cache(maxsize=32)
def walk_tower(tower: VisionBackbone, images: int, setup: Setup) -> tuple[Phases, torch.Size, torch.dtype]:
    """Memory of the tower's phase `forward` and, for a trained tower, `kept` (by autograd, without the features) and
    `backward`; shape and dtype of its features."""
    mode = FakeTensorMode()
    # Equal frozen blocks reach the same peak one after the other, so one of them is enough.
    backbone = copy.deepcopy(tower).train() if tower.trained else short_backbone(tower)[0]
    half = setup.half or (setup.autocast and not tower.trained)  # see `training.trainer.half_precision_tower`
    to_fake(backbone, mode, torch.bfloat16 if half else None)
    checkpoint_activations(None, setup.checkpointing, backbone.blocks if tower.trained else ())
    with mode, without_data("backbone"), torch.set_grad_enabled(tower.trained):
        towers = backbone.transform.towers.items()
        pixels = {name: torch.empty(images, 3, t.image_size, t.image_size, device="cpu") for name, t in towers}
        with _autocast(setup), TensorMeter(backbone) as meter:
            meter.phase("forward")
            features = backbone(pixels)
            phases = dict(meter.peaks)  # a copy, without the phases that follow
            if tower.trained:
                # The features are left out: the projector's walk counts them if it keeps them.
                kept = meter.live - features.untyped_storage().nbytes()
                meter.phase("backward")
                features.backward(torch.empty_like(features))
                phases = meter.peaks | {"kept": (kept, kept)}
    return phases, features.shape, features.dtype


@lru_cache(maxsize=64)
def walk_projector(bare: Projector, shape: torch.Size, dtype: torch.dtype, setup: Setup, tower_trained: bool) -> Phases:
    """Memory of the phases `forward`, `kept` (by autograd, after the forward pass) and `backward`."""
    mode = FakeTensorMode()
    projector = copy.deepcopy(bare).train()
    to_fake(projector, mode, _weights_type(setup))
    with mode, without_data("projector"), _autocast(setup), TensorMeter(projector) as meter:
        meter.phase("forward")
        # The features are not bound to a name: as in `VLM.visual_tokens`, only autograd can keep them alive.
        own = _weights_type(setup) or dtype
        # A trained tower needs the gradient of its features.
        tokens = projector(torch.empty(shape, dtype=own, device="cpu", requires_grad=tower_trained))
        # A phase begins by noting what is alive: this one ends at once and has nothing else.
        meter.phase("kept")
        meter.phase("backward")
        tokens.backward(torch.empty_like(tokens))
    return meter.peaks


def walk_language(
    key: str, depth: int, shape: PassShape, turn_mask: str, max_logits: int | None, setup: Setup
) -> Phases:
    """Memory of the phases `layers` (forward), `kept` (by autograd, after it), `loss`, and the backward passes of the
    `last` and of the `first` layer.

    All layers are alike, so each phase is extrapolated from one and two layers.

    Args:
        key: of the LLM, see `meta_models.llm_key`.
        depth: number of layers.
        turn_mask, max_logits: as in the recipe.
    """
    if depth <= 2:
        return _walk_language(key, depth, shape, turn_mask, max_logits, setup)
    one, two = (_walk_language(key, layers, shape, turn_mask, max_logits, setup) for layers in (1, 2))

    def extend(low: int, high: int) -> int:
        return low + (depth - 1) * (high - low)

    # Pairs without and with gradients of parameters, see `Phases`.
    return {phase: (extend(one[phase][0], two[phase][0]), extend(one[phase][1], two[phase][1])) for phase in two}


@lru_cache(maxsize=64)
def _walk_language(
    key: str, depth: int, shape: PassShape, turn_mask: str, max_logits: int | None, setup: Setup
) -> Phases:
    lm = build_shallow(key, depth)
    mode = FakeTensorMode()
    to_fake(lm, mode, _weights_type(setup))
    vlm = _without_tower(lm, turn_mask, max_logits)
    vlm.train()
    checkpoint_activations(lm, setup.checkpointing)
    # Not every version of transformers has these two functions: `create` allows for that.
    # transformers looks at the values of position_ids to detect packed sequences; fake tensors have none.
    one_sequence = mock.patch.object(
        masking_utils, "find_packed_sequence_indices", lambda position_ids: None, create=True
    )
    # torch's grouped product accepts only half precision on fake tensors; transformers' own makes the same tensors.
    any_type = mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False, create=True)
    with mode, without_data("LLM"), one_sequence, any_type:
        batch, visual = _batch(lm, shape)
        with _autocast(setup), TensorMeter(lm) as meter:
            for number, layer in enumerate(decoder_layers(lm)):
                layer.register_forward_hook(_starts(meter, "last" if number == depth - 1 else "first"))
                if setup.autocast and setup.cuda:
                    CudaTypes().within(layer)
            meter.phase("layers")
            _summed_loss(vlm, batch, visual, meter).backward()
    return {"first": meter.peaks["last"]} | meter.peaks  # a single layer is both


def _weights_type(setup: Setup) -> torch.dtype | None:
    return torch.bfloat16 if setup.half else None


def _autocast(setup: Setup) -> torch.autocast:
    # As Lightning does: bfloat16 copies of the weights are not cached beyond an operation.
    return torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast, cache_enabled=False)


def _starts(meter: TensorMeter, phase: str) -> Any:
    """A forward hook that starts the phase when the gradient of the layer's output arrives."""

    def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden.register_hook(lambda _: meter.phase(phase))

    return hook


def _without_tower(lm: Any, turn_mask: str, max_logits: int | None) -> VLM:
    """A VLM for precomputed visual tokens."""
    backbone = VisionBackbone()
    backbone.grid, backbone.embed_dim = (1, 1), 1
    projector = build_projector("linear", 1, lm.get_input_embeddings().embedding_dim, (1, 1))
    return VLM(backbone, projector, lm, turn_mask=turn_mask, max_logits=max_logits)


def _batch(lm: Any, shape: PassShape) -> tuple[Batch, Tensor]:
    """A batch and its visual tokens."""
    size = (1, shape.records * shape.length) if shape.packed else (shape.records, shape.length)
    # Only shapes and types matter, so one tensor serves as several fields.
    ids, mask = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)
    lengths = (shape.length,) * shape.records if shape.packed else None
    targets = torch.ones(shape.supervised, dtype=torch.long)
    batch = Batch(ids, ids, mask, mask, ids, ids, lengths=lengths, targets=targets)
    table = lm.get_input_embeddings().weight
    visual = torch.empty(shape.records, shape.visual, table.shape[1], dtype=table.dtype, requires_grad=True)
    return batch, visual


def _summed_loss(vlm: VLM, batch: Batch, visual: Tensor, meter: TensorMeter) -> Tensor:
    """`VLM.forward`, reporting its phases to the meter."""
    hidden = vlm.hidden_states(batch, visual).flatten(0, 1)
    meter.phase("kept")
    meter.phase("loss")
    head = cast(nn.Linear, vlm.lm.get_output_embeddings())
    # `targets` are positions; the one before each predicts it. In place of token ids, which have no values here, the
    # same tensor gives the loss its shape.
    return summed_cross_entropy(
        hidden[batch.targets - 1], head.weight, head.bias, batch.targets, max_logits=vlm.max_logits
    )
