"""Peak memory of one device during a training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from omegaconf import DictConfig
from torch import nn

from prism_deco.backbones import VisionBackbone
from prism_deco.llms.layers import decoder_layers
from prism_deco.plan.devices import Setup
from prism_deco.plan.fake_memory import PassShape, walk_language, walk_projector, walk_tower
from prism_deco.plan.meta_models import backbone_of, count, llm_key, llm_of, projector_of

FLOAT32 = 4
NF4 = 4.127 / 8
"""Bytes of a 4-bit weight with its share of the doubly quantised scales (arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak; the parts add up to `peak`."""

    weights: int
    """This device's share of projector and LLM, in float32 where they are trained."""
    tower: int
    """The backbone's weights."""
    gradients: int
    """Gradients that exist at that moment, and copies for their reduction."""
    optimizer: int
    """AdamW's two moments."""
    inputs: int
    """Pixels of the whole optimizer step."""
    activations: int
    """Saved tensors and temporary ones, bfloat16 copies of the weights included."""
    logits: int
    """Logits of the supervised positions, and the tensors of their loss."""
    gathered: int
    """Parameters and gradients of neighbouring blocks that sharding has gathered."""
    when: str
    """The moment of the peak."""

    @property
    def peak(self) -> int:
        parts = (self.weights, self.tower, self.gradients, self.optimizer, self.inputs)
        return sum(parts) + self.activations + self.logits + self.gathered


class Moment(NamedTuple):
    """The bytes that vary during a step."""

    activations: int
    logits: int
    gradients: int
    gathered: int


def step_memory(config: DictConfig, setup: Setup, shape: PassShape) -> Memory:
    """Memory of a training step at its peak."""
    backbone, lm, projector = backbone_of(config), llm_of(config).model, projector_of(config)
    trained = count(backbone, projector, lm, trained=True)
    all_gradients = FLOAT32 * trained // setup.shards
    # Gradients of earlier passes exist throughout. Sharded ones are small: they are counted throughout as well.
    earlier = all_gradients if shape.passes > 1 or setup.shards > 1 else None
    neighbours, last_exchange = _gathered(projector, lm, setup)
    moments: dict[str, Moment] = {}

    def add(name: str, phase: tuple[int, int], *, kept: int = 0, made: int = 0, loss_from: int | None = None) -> None:
        # `alone` is without gradients of parameters, `both` with those that this part has computed so far. `kept` is
        # what earlier parts hold for their backward pass, `made` the gradients of parts whose backward pass is over.
        # `loss_from` is what is alive before the loss: whatever the loss adds to it counts as logits.
        alone, both = phase
        logits = 0 if loss_from is None else alone - loss_from
        gradients = made + both - alone if earlier is None else earlier
        moments[name] = Moment(alone - logits + kept, logits, gradients, neighbours)

    # Activations outside the LLM and a trained tower are never recomputed.
    outside = replace(setup, checkpointing="none")
    # In the order of a step. Forward passes pile up what they keep, backward passes release it from the top.
    tower, size, dtype = walk_tower(backbone, shape.records, setup if backbone.trained else outside)
    add("tower", tower["forward"])
    below = tower["kept"][0] if backbone.trained else 0
    projected = walk_projector(projector, size, dtype, outside, backbone.trained)
    add("projector forward", projected["forward"], kept=below)
    kept = below + projected["kept"][0]
    recipe = config.recipe
    language = walk_language(
        llm_key(config), lm.config.num_hidden_layers, shape, recipe.turn_mask, recipe.max_logits, setup
    )
    add("LLM forward", language["layers"], kept=kept)
    add("loss", language["loss"], kept=kept, loss_from=language["kept"][0])
    add("backward, last layer", language["last"], kept=kept)
    add("backward, first layer", language["first"], kept=kept)
    add("projector backward", projected["backward"], kept=below, made=FLOAT32 * count(lm, trained=True))
    # Its phase already includes what the tower itself keeps.
    if backbone.trained:
        add("tower backward", tower["backward"], made=FLOAT32 * count(projector, lm, trained=True))
    # Fused AdamW allocates nothing beyond its moments.
    moments["optimizer"] = Moment(0, 0, all_gradients, last_exchange)
    when = max(moments, key=lambda name: sum(moments[name]))
    fullest = moments[when]
    return Memory(
        weights=_weights(config, projector, lm) // setup.shards,
        tower=_tower(backbone, setup),
        # DDP's buckets hold a second copy of all gradients.
        gradients=fullest.gradients + (FLOAT32 * trained if setup.devices > 1 and setup.shards == 1 else 0),
        optimizer=2 * FLOAT32 * trained // setup.shards,
        inputs=shape.records * shape.passes * _pixel_bytes(backbone),
        activations=fullest.activations,
        logits=fullest.logits,
        gathered=fullest.gathered,
        when=when,
    )


def _tower(backbone: VisionBackbone, setup: Setup) -> int:
    total = sum(p.numel() * p.element_size() for p in backbone.parameters())
    # A frozen tower is stored in half precision, except for shards, which become so when they are gathered.
    return total // (2 if setup.autocast and not backbone.trained else setup.shards)


def _weights(config: DictConfig, projector: nn.Module, lm: nn.Module) -> int:
    # A set, so that tied weights count once.
    total = sum(p.numel() * p.element_size() for p in {*projector.parameters(), *lm.parameters()})
    if llm_of(config).spec.quantize is None:
        return total
    frozen = [m.weight for m in lm.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    head: Any = lm.get_output_embeddings()  # type: ignore[operator]  # not quantised
    linear = [weight for weight in frozen if weight is not head.weight]
    return total - round(sum(weight.numel() * (weight.element_size() - NF4) for weight in linear))


def _pixel_bytes(backbone: VisionBackbone) -> int:
    return sum(3 * FLOAT32 * tower.image_size**2 for tower in backbone.transform.towers.values())


def _gathered(projector: nn.Module, lm: nn.Module, setup: Setup) -> tuple[int, int]:
    """Bytes that sharding gathers during forward and backward, and in the root group's reduction at the end.

    `fully_shard` keeps the root group (embeddings, head, projector) gathered. Of the blocks it holds the current one,
    the prefetched one (in its buffer and unpacked), and one block's gradients in reduction.
    """
    if setup.shards == 1:
        return 0, 0
    layers = decoder_layers(lm)
    block, root = count(layers[0]), count(projector, lm) - count(*layers)
    size = 2 if setup.half else FLOAT32
    return root * 2 * size + block * (4 * size + setup.reduce), root * (2 * size + setup.reduce)
