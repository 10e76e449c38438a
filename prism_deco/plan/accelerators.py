"""What accelerators can do at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prism_deco.config.registry import unknown

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A kind of accelerator.

    Attributes:
        flops: peak of dense bfloat16 matrix products with float32 accumulation, per second.
        memory: usable bytes, as the driver reports them.
        mark: part of the name by which CUDA knows it, in small letters.
    """

    flops: float
    memory: int
    mark: str


# Dense figures of NVIDIA's data sheets, which print the double for sparse matrices. Lightning's table
# (`lightning_fabric.utilities.throughput`) has the sparse figures for H200 and H100 NVL and half for GeForce.
ACCELERATORS = {
    "a100": Accelerator(312e12, 79 * GIB, "a100"),  # A100 80GB datasheet, 2021
    "a100_40gb": Accelerator(312e12, 39 * GIB, "a100-sxm4-40gb"),  # A100 40GB datasheet, 2020
    "h100": Accelerator(989.4e12, 79 * GIB, "h100 80gb hbm3"),  # H100 SXM: H100 architecture white paper, table 2
    "h100_pcie": Accelerator(756e12, 79 * GIB, "h100 pcie"),  # same place, PCIe
    "h200": Accelerator(989.4e12, 139 * GIB, "h200"),  # H200 SXM datasheet, 2024 (1,979 with sparsity)
    "l40s": Accelerator(362e12, 44 * GIB, "l40s"),  # L40S datasheet, 2023
    "l4": Accelerator(121e12, 22 * GIB, "nvidia l4"),  # L4 datasheet, 2023 (242 with sparsity)
    "a10g": Accelerator(70e12, 22 * GIB, "a10g"),  # A10G: AWS G5, 70 dense
    "rtx4090": Accelerator(165.2e12, 23 * GIB, "rtx 4090"),  # Ada white paper, appendix A
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name; `UsageError` lists the choices otherwise."""
    if name not in ACCELERATORS:
        raise unknown("accelerator", name, ACCELERATORS)
    return ACCELERATORS[name]


def accelerator_of(device: torch.device) -> str | None:
    """The name of a device of this machine among `ACCELERATORS`; None where it is not known, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    known = [kind for kind in ACCELERATORS if ACCELERATORS[kind].mark in name]
    return max(known, key=lambda kind: len(ACCELERATORS[kind].mark)) if known else None


def peak_flops(device: torch.device) -> float | None:
    """Peak of a device of this machine, operations per second; None where it is not known."""
    kind = accelerator_of(device)
    return ACCELERATORS[kind].flops if kind else None


def device_memory() -> int:
    """Bytes of this machine's first GPU, or of its main memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
