"""The phases of a training step: each part of the model walked through by itself, on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prism_deco.backbones import VisionBackbone
from prism_deco.llms.layers import checkpoint_activations, decoder_layers
from prism_deco.loss import summed_cross_entropy
from prism_deco.plan.meta_models import build_projector_of, build_shallow, fresh_backbone
from prism_deco.plan.setup import Setup
from prism_deco.plan.simulate import CudaTypes, Ledger, to_fake
from prism_deco.projectors import build_projector
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM

Phases = dict[str, tuple[int, int]]
"""Per phase the largest number of bytes: without gradients of parameters, and with those made so far."""


@dataclass(frozen=True)
class Layout:
    """The largest forward pass of one device.

    Attributes:
        records: sequences, with one image each.
        length: positions they are padded to, visual tokens included.
        visual: visual tokens of an image.
        supervised: supervised positions in all.
        passes: forward passes of an optimizer step.
        packed: the sequences share one row.
    """

    records: int
    length: int
    visual: int
    supervised: int
    passes: int
    packed: bool = False


@dataclass(frozen=True)
class Loss:
    """What the recipe says about attention and loss: `turn_mask`, `max_logits`."""

    turn_mask: str
    max_logits: int | None


@dataclass(frozen=True)
class Walk:
    """A part that was walked through.

    Attributes:
        phases: its memory.
        flops: operations per image.
        shape, dtype: of its result.
    """

    phases: Phases
    flops: int
    shape: torch.Size
    dtype: torch.dtype


@lru_cache(maxsize=32)
def walk_tower(key: str, images: int, setup: Setup) -> Walk:
    """The frozen tower, in the one phase `forward`.

    Args:
        key: names the backbone, see `parts.backbone_key`.
    """
    mode = FakeTensorMode()
    backbone = fresh_backbone(key)
    walked = _shorten(backbone)
    to_fake(backbone, mode, _weights_type(setup))
    with mode, torch.no_grad():
        towers = backbone.transform.towers.items()
        pixels = {name: torch.empty(images, 3, t.image_size, t.image_size, device="cpu") for name, t in towers}
        with _autocast(setup), Ledger(backbone) as ledger:
            for block, times in walked:
                ledger.multiply(block, times)
            ledger.phase("forward")
            features = backbone(pixels)
    return Walk(ledger.peaks, ledger.flops // images, features.shape, features.dtype)


@lru_cache(maxsize=64)
def walk_projector(key: str, shape: torch.Size, dtype: torch.dtype, setup: Setup) -> Walk:
    """Phases `forward`, `kept` (by autograd, when it is done) and `backward` on features of that shape.

    Args:
        key: names the projector, see `parts.projector_key`.
    """
    mode = FakeTensorMode()
    projector = build_projector_of(key).train()
    to_fake(projector, mode, _weights_type(setup))
    with mode, _autocast(setup), Ledger(projector) as ledger:
        ledger.phase("forward")
        # No name holds the features: unless autograd keeps them they die with the call, as in `VLM.visual_tokens`.
        tokens = projector(torch.empty(shape, dtype=_weights_type(setup) or dtype, device="cpu"))
        ledger.phase("kept")
        ledger.phase("backward")
        tokens.backward(torch.empty_like(tokens))
    return Walk(ledger.peaks, ledger.flops // shape[0], tokens.shape, tokens.dtype)


def walk_language(key: str, depth: int, layout: Layout, loss: Loss, setup: Setup) -> Phases:
    """Phases `layers` (forward), `kept` (by autograd then), `loss`, backward of the `last` and of the `first` layer.

    Layers are alike: what two and three of them need tells what any number needs, phase by phase.

    Args:
        key: names the LLM, see `parts.llm_key`.
        depth: its layers.
    """
    if depth <= 3:
        return _walk_language(key, depth, layout, loss, setup)
    two, three = (_walk_language(key, layers, layout, loss, setup) for layers in (2, 3))

    def extend(low: int, high: int) -> int:
        return low + (depth - 2) * (high - low)

    return {p: (extend(two[p][0], three[p][0]), extend(two[p][1], three[p][1])) for p in two}


@lru_cache(maxsize=64)
def _walk_language(key: str, depth: int, layout: Layout, loss: Loss, setup: Setup) -> Phases:
    lm = build_shallow(key, depth)
    mode = FakeTensorMode()
    to_fake(lm, mode, _weights_type(setup))
    vlm = _without_tower(lm, loss)
    vlm.train()
    checkpoint_activations(lm, setup.checkpointing)
    with mode:
        batch, visual, places = _batch(lm, layout)
        with _autocast(setup), Ledger(lm) as ledger:
            for number, layer in enumerate(decoder_layers(lm)):
                name = "last" if number == depth - 1 else "first" if number == 0 else "between"
                layer.register_forward_hook(_starts(ledger, name))
                if setup.autocast and setup.cuda:
                    CudaTypes().within(layer)
            ledger.phase("layers")
            _summed_loss(vlm, batch, visual, places, ledger).backward()
    peaks = ledger.peaks
    peaks.pop("between", None)
    return {"first": peaks["last"]} | peaks


def _shorten(backbone: VisionBackbone) -> list[tuple[nn.Module, int]]:
    """Leaves of a run of equal blocks the first, and says how many they were: frozen, each block needs the same memory
    once the one before it is done."""
    walked: list[tuple[nn.Module, int]] = []
    for block in backbone.blocks:
        shapes = [parameter.shape for parameter in block.parameters()]
        if walked and shapes == [parameter.shape for parameter in walked[-1][0].parameters()]:
            walked[-1] = walked[-1][0], walked[-1][1] + 1
            block._modules.clear()
            block._parameters.clear()
            block.forward = lambda x, *_, **__: x
        else:
            walked.append((block, 1))
    return walked


def _weights_type(setup: Setup) -> torch.dtype | None:
    return torch.bfloat16 if setup.half else None


def _autocast(setup: Setup) -> torch.autocast:
    # Lightning keeps no copies of the weights beyond the operation that needs them.
    return torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast, cache_enabled=False)


def _starts(ledger: Ledger, phase: str) -> Any:
    """A forward hook: the phase starts when the gradient of the layer's output is there."""

    def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden.register_hook(lambda _: ledger.phase(phase))

    return hook


def _without_tower(lm: Any, loss: Loss) -> VLM:
    """A VLM that is only ever given ready visual tokens."""
    backbone = VisionBackbone()
    backbone.grid, backbone.embed_dim = (1, 1), 1
    projector = build_projector("linear", 1, lm.get_input_embeddings().embedding_dim, (1, 1))
    return VLM(backbone, projector, lm, turn_mask=loss.turn_mask, max_logits=loss.max_logits)


def _batch(lm: Any, layout: Layout) -> tuple[Batch, Tensor, Tensor]:
    """A batch, its visual tokens, and the places (record, position) of the supervised tokens, int64[S, 2]."""
    shape = (1, layout.records * layout.length) if layout.packed else (layout.records, layout.length)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
    lengths = (layout.length,) * layout.records if layout.packed else None
    batch = Batch(ids, ids, mask, mask, ids, ids, lengths=lengths)
    table = lm.get_input_embeddings().weight
    visual = torch.empty(layout.records, layout.visual, table.shape[1], dtype=table.dtype, requires_grad=True)
    return batch, visual, torch.zeros(layout.supervised, 2, dtype=torch.long)


def _summed_loss(vlm: VLM, batch: Batch, visual: Tensor, places: Tensor, ledger: Ledger) -> Tensor:
    """`VLM.forward`; which positions are supervised is data, and fake tensors have none."""
    hidden = vlm.hidden_states(batch, visual)[:, :-1]
    ledger.phase("kept")
    ledger.phase("loss")
    records, positions = places.unbind(dim=1)
    head = cast(nn.Linear, vlm.lm.get_output_embeddings())
    return summed_cross_entropy(
        hidden[records, positions], head.weight, head.bias, torch.zeros_like(records), max_logits=vlm.max_logits
    )
