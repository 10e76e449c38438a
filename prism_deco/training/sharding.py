"""Distributing a model over devices: Lightning's strategies, the modules that FSDP2 (`fully_shard`) shards, the local
block of a sharded tensor, and reading just that block from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel
from prism_deco.llms.build import added_rows, weight_map
from prism_deco.llms.layers import decoder_layers, fill_buffers
from prism_deco.llms.lora import draw_lora
from prism_deco.projectors import Projector
from prism_deco.tensors import base_name, is_adapter
from prism_deco.vlm import VLM


def strategy_of(trainer: DictConfig, world: World) -> Any:
    """Lightning's strategy for the `trainer` group; `UsageError` if it does not support the number of devices."""
    if trainer.strategy == "ddp":
        return DDPStrategy(timeout=world.timeout)
    if trainer.strategy == "fsdp":
        # Lightning's default ("auto") makes the data-parallel size the number of nodes.
        return ModelParallelStrategy(data_parallel_size=world.size, tensor_parallel_size=1)
    if world.size > 1:
        raise UsageError(f"{world.size} devices need trainer.strategy=ddp or trainer.strategy=fsdp.")
    return "auto"


@dataclass(frozen=True)
class Sharding:
    """Shards a VLM's weights over the processes.

    Attributes:
        shard_size: processes that share one copy of the weights; None is all of them. If smaller, each group of this
            size holds a copy, and gradients are averaged over the groups (hybrid sharding).
        compute: dtype that weights are gathered and computed in; the shards and the optimizer stay in float32.
        reduce: dtype that gradients are summed in.
        timeout: of a collective.
    """

    shard_size: int | None
    compute: torch.dtype
    reduce: torch.dtype
    timeout: timedelta

    @classmethod
    def of(cls, trainer: DictConfig, world_size: int) -> Sharding:
        """From the `trainer` group; `UsageError` if its `shard_size` does not divide the number of processes."""
        size = trainer.shard_size
        if size is not None and world_size % size:
            raise UsageError(f"trainer.shard_size={size} does not divide the {world_size} processes of the run.")
        compute = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        timeout = timedelta(minutes=trainer.timeout_minutes)
        return cls(size, compute, getattr(torch, trainer.reduce_dtype), timeout)

    def apply(self, vlm: VLM, llm: LanguageModel, mesh: DeviceMesh) -> None:
        """Shards a VLM in place, and reads the LLM's weights if they are still on the meta device.

        Args:
            mesh: one dimension over all processes.
        """
        # With a smaller mesh, gradients would not be synchronised over all processes, without any error.
        assert mesh.ndim == 1 and mesh.size() == dist.get_world_size(), mesh
        if self.shard_size not in (None, mesh.size()):
            mesh = self._hybrid(mesh)
        for unit in [*sharded_units(vlm), vlm]:
            fully_shard(unit, mesh=mesh, mp_policy=self._policy(unit))
        if any(parameter.is_meta for parameter in vlm.lm.parameters()):
            files = weight_map(llm.spec)
            assert files is not None
            read_weights(vlm.lm, files, torch.device(mesh.device_type))
        # A rank without images must still gather the tower's and the projector's weights, or the others would hang.
        vlm.every_unit = True
        for method in ("visual_tokens", "generate"):
            register_fsdp_forward_method(vlm, method)
        # Has transformers continue generation on a finished rank until all ranks are done.
        vlm.lm._is_fsdp_managed_module = True  # type: ignore[assignment]

    def _policy(self, unit: nn.Module) -> MixedPrecisionPolicy:
        own = unit.compute_dtype if isinstance(unit, Projector) else None
        if own is None:
            return MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=self.reduce)
        return MixedPrecisionPolicy(param_dtype=own, reduce_dtype=self.reduce, output_dtype=self.compute)

    def _hybrid(self, mesh: DeviceMesh) -> DeviceMesh:
        """A mesh (replicate, shard): `shard_size` consecutive ranks share one copy of the weights."""
        places = torch.arange(mesh.size()).view(-1, self.shard_size or mesh.size())
        # `init_device_mesh` would create the groups with torch's default timeout, ten minutes under NCCL.
        groups: Any = [dist.new_subgroups_by_enumeration(g.tolist(), self.timeout)[0] for g in (places.T, places)]
        return DeviceMesh.from_group(groups, mesh.device_type, mesh=places, mesh_dim_names=("replicate", "shard"))


def sharded_units(vlm: VLM) -> list[nn.Module]:
    """Modules whose weights are gathered together, inner ones first: the tower's blocks, the tower, the LLM's layers,
    the projector. The rest (embeddings and head, which may be tied) belongs to the root.

    These are the units of prismatic-vlms.
    """
    units = [*vlm.backbone.blocks, vlm.backbone, *decoder_layers(vlm.lm), vlm.projector]
    return [unit for unit in units if next(unit.parameters(), None) is not None]


def reshard(vlm: nn.Module) -> None:
    """Frees gathered weights, so that parameters are shards again: those of the root stay gathered after a
    validation."""
    for module in vlm.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, with the shape of the whole tensor and the block's offset in it."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def local_piece(tensor: Tensor) -> Piece:
    """This process's block of a tensor: its shard under `fully_shard`, otherwise the whole tensor."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), shape, (0,) * len(shape))
    local = tensor.to_local().detach()
    expected, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    assert tuple(local.shape) == expected, "not sharded by fully_shard"
    return Piece(local, shape, offset)


def piece_of(tensor: Tensor, rank: int) -> Piece | None:
    """The block of a tensor that this process has to write; None if it is empty or another process writes it."""
    if not isinstance(tensor, DTensor):
        return local_piece(tensor) if rank == 0 else None
    mesh = tensor.device_mesh
    # Under hybrid sharding, the first of the replicas writes.
    copies = [mesh.get_local_rank(d) for d, p in enumerate(tensor.placements) if isinstance(p, Replicate)]
    piece = local_piece(tensor)
    return piece if not any(copies) and piece.tensor.numel() else None


@torch.no_grad()
def read_weights(lm: PreTrainedModel, files: Mapping[str, Path], device: torch.device) -> None:
    """Reads the weights of an LLM on the meta device, sharded or not, from safetensors files.

    A process has no more in memory than its shard and the rows that it reads of one tensor.

    Args:
        files: the file of each tensor, by name.

    Raises:
        UsageError: a weight is missing or has another shape.
    """
    # `to_empty` also discards the buffers and unties tied weights.
    fill_buffers(lm)
    buffers = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    lm.to_empty(device=device)
    lm.tie_weights()
    for name, buffer in lm.named_buffers():
        buffer.copy_(buffers[name])
    handles: dict[Path, Any] = {}
    for adapted, parameter in lm.named_parameters():
        piece = local_piece(parameter)
        if is_adapter(adapted):
            start = piece.offset[0]
            piece.tensor.copy_(draw_lora(adapted, piece.shape)[start : start + len(piece.tensor)])
            continue
        name = base_name(adapted)
        if name not in files:
            raise UsageError(f"The language model's files are missing the weight {name}.")
        file = handles.setdefault(files[name], safe_open(files[name], "pt"))
        _read(name, file.get_slice(name), piece, lm.config.initializer_range)


def _read(name: str, stored: Any, piece: Piece, std: float) -> None:
    """Fills a block, which is sharded along dimension 0, from a stored tensor; draws the rows of added tokens."""
    shape = tuple(stored.get_shape())
    added = piece.shape[0] - shape[0]
    # Embeddings, head and the head's bias have a row per token, of which the tokenizer may need more or fewer.
    by_token = "embed" in name or "lm_head" in name
    if shape[1:] != piece.shape[1:] or (added and not by_token):
        raise UsageError(f"The weight {name} is {list(shape)} in its file and {list(piece.shape)} in the model.")
    if not piece.tensor.numel():
        return
    start, rows = piece.offset[0], piece.tensor.shape[0]
    there = max(0, min(rows, shape[0] - start))  # rows of the block that are in the file
    if there:
        piece.tensor[:there].copy_(stored[start : start + there])
    if there < rows and len(shape) == 1:
        piece.tensor[there:].zero_()
    elif there < rows:
        # Drawn whole on every process, so that they do not depend on how they are sharded.
        piece.tensor[there:].copy_(added_rows(added, piece.shape[1], std)[start + there - shape[0] :][: rows - there])
