"""How a run is spread over devices, as far as memory and speed depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from omegaconf import DictConfig

NODE = 8
"""GPUs of a node, where the configuration says "all" and this machine has none."""


@dataclass(frozen=True)
class Setup:
    """The devices of a run and the types they compute in.

    Attributes:
        devices: in all nodes.
        shards: devices that share the weights of one copy of the model; 1 keeps all of it on each.
        autocast: bfloat16 compute by autocast over float32 weights.
        half: bfloat16 copies of the weights are gathered from float32 shards (`fully_shard`).
        cuda: it runs on GPUs (optimizer and autocast differ a little from the CPU's).
        reduce: bytes of an element of the gradients that shards exchange.
        checkpointing: `trainer.activation_checkpointing`.
    """

    devices: int = 1
    shards: int = 1
    autocast: bool = False
    half: bool = False
    cuda: bool = False
    reduce: int = 4
    checkpointing: str = "none"

    @property
    def outside_llm(self) -> Setup:
        """As it concerns tower and projector, whose activations are never recomputed."""
        return replace(self, checkpointing="none")

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.devices // self.shards


def setup_of(config: DictConfig) -> Setup:
    """What the `trainer` group of a configuration asks for."""
    trainer = config.trainer
    cuda = trainer.accelerator != "cpu" and (trainer.accelerator != "auto" or torch.cuda.is_available())
    per_node = trainer.devices if trainer.devices > 0 else torch.cuda.device_count() or NODE
    devices, sharded, half = per_node * trainer.num_nodes, trainer.strategy == "fsdp", "bf16" in trainer.precision
    return Setup(
        devices=devices,
        shards=(trainer.shard_size or devices) if sharded else 1,
        autocast=half and not sharded,
        half=half and sharded,
        cuda=cuda,
        reduce=2 if trainer.reduce_dtype == "bfloat16" else 4,
        checkpointing=trainer.activation_checkpointing,
    )
