"""The devices of a run: sharding, precision, speed and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from prism_deco.config.registry import unknown

GIB = 2**30

NODE = 8
"""GPUs per node to assume if the configuration says "all" and this machine has none."""


@dataclass(frozen=True)
class Setup:
    """The devices of a run and their precision.

    Attributes:
        devices: on all nodes.
        shards: devices that share one copy of the weights; 1 keeps a whole copy on each.
        autocast: bfloat16 compute by autocast over float32 weights.
        half: `fully_shard` gathers float32 shards as bfloat16 weights.
        cuda: runs on GPUs, whose autocast differs a little from the CPU's.
        reduce: bytes per element of reduced gradients.
        checkpointing: `trainer.activation_checkpointing`.
    """

    devices: int = 1
    shards: int = 1
    autocast: bool = False
    half: bool = False
    cuda: bool = False
    reduce: int = 4
    checkpointing: str = "none"


def setup_of(config: DictConfig) -> Setup:
    """The devices that the `trainer` group asks for."""
    trainer = config.trainer
    cuda = trainer.accelerator != "cpu" and (trainer.accelerator != "auto" or torch.cuda.is_available())
    # devices=-1 takes all.
    per_node = trainer.devices if trainer.devices > 0 else torch.cuda.device_count() or NODE
    devices = per_node * trainer.num_nodes
    sharded = trainer.strategy == "fsdp"
    half = "bf16" in trainer.precision
    return Setup(
        devices=devices,
        shards=(trainer.shard_size or devices) if sharded else 1,
        autocast=half and not sharded,
        half=half and sharded,
        cuda=cuda,
        reduce=2 if trainer.reduce_dtype == "bfloat16" else 4,
        checkpointing=trainer.activation_checkpointing,
    )


@dataclass(frozen=True)
class Accelerator:
    """A kind of accelerator.

    Attributes:
        flops: peak FLOP/s of dense bfloat16 matrix products with float32 accumulation.
        memory: usable bytes, as the driver reports them.
        mark: substring of CUDA's device name, in lower case.
    """

    flops: float
    memory: int
    mark: str


# Dense figures from NVIDIA's data sheets, which print twice as much for sparse matrices. Lightning's table
# (`lightning_fabric.utilities.throughput`) has the sparse figures for H200 and H100 NVL, and half of GeForce's.
ACCELERATORS = {
    "a100": Accelerator(312e12, 79 * GIB, "a100"),  # A100 80GB datasheet, 2021
    "a100_40gb": Accelerator(312e12, 39 * GIB, "a100-sxm4-40gb"),  # A100 40GB datasheet, 2020
    "h100": Accelerator(989.4e12, 79 * GIB, "h100 80gb hbm3"),  # H100 SXM: H100 architecture white paper, table 2
    "h100_pcie": Accelerator(756e12, 79 * GIB, "h100 pcie"),  # same white paper, PCIe
    "h200": Accelerator(989.4e12, 139 * GIB, "h200"),  # H200 SXM datasheet, 2024 (1,979 with sparsity)
    "l40s": Accelerator(362e12, 44 * GIB, "l40s"),  # L40S datasheet, 2023
    "l4": Accelerator(121e12, 22 * GIB, "nvidia l4"),  # L4 datasheet, 2023 (242 with sparsity)
    "a10g": Accelerator(70e12, 22 * GIB, "a10g"),  # A10G: AWS G5, 70 dense
    "rtx4090": Accelerator(165.2e12, 23 * GIB, "rtx 4090"),  # Ada white paper, appendix A
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name; raises `UsageError` with the choices if there is none."""
    if name not in ACCELERATORS:
        raise unknown("accelerator", name, ACCELERATORS)
    return ACCELERATORS[name]


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a device of this machine; None if it is unknown, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    known = [kind for kind in ACCELERATORS.values() if kind.mark in name]
    # Several marks may match, such as "a100" and "a100-sxm4-40gb": the longest is the most specific.
    return max(known, key=lambda kind: len(kind.mark)).flops if known else None


def device_memory() -> int:
    """Bytes of this machine's first GPU, or of its main memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]  # (free, total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
