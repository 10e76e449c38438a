"""How a model is spread over devices: Lightning's strategies, which modules FSDP2 (`fully_shard`) shards, which part of
a sharded tensor this process holds, and how each process reads just its own part from files."""

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
    """Lightning's strategy that the `trainer` group names; `UsageError` where it is not for that many devices."""
    if trainer.strategy == "ddp":
        return DDPStrategy(timeout=world.timeout)
    if trainer.strategy == "fsdp":
        # The defaults shard nothing and synchronise nothing.
        return ModelParallelStrategy(data_parallel_size=world.size, tensor_parallel_size=1)
    if world.size > 1:
        raise UsageError(f"{world.size} devices need trainer.strategy=ddp or trainer.strategy=fsdp.")
    return "auto"


@dataclass(frozen=True)
class Sharding:
    """Divides a VLM's weights among the processes.

    Attributes:
        shard_size: processes that share one copy of the weights; None is all of them. With less, each such group
            holds a copy and gradients are averaged over the groups (hybrid sharding).
        compute: type that weights are gathered and computed in; the shards and the optimizer stay in float32.
        reduce: type that gradients are summed in.
        timeout: what a collective may take.
    """

    shard_size: int | None
    compute: torch.dtype
    reduce: torch.dtype
    timeout: timedelta

    @classmethod
    def of(cls, trainer: DictConfig, world_size: int) -> Sharding:
        """As the `trainer` group says; `UsageError` where its `shard_size` does not divide the number of processes."""
        size = trainer.shard_size
        if size is not None and world_size % size:
            raise UsageError(f"trainer.shard_size={size} does not divide the {world_size} processes of the run.")
        compute = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        timeout = timedelta(minutes=trainer.timeout_minutes)
        return cls(size, compute, getattr(torch, trainer.reduce_dtype), timeout)

    def apply(self, vlm: VLM, llm: LanguageModel, mesh: DeviceMesh) -> None:
        """Shards a VLM in place, and reads the LLM's weights where they are still on the meta device.

        Args:
            mesh: one dimension over all processes.
        """
        # A mesh of less shards less and leaves gradients unsynchronised, without any error.
        assert mesh.ndim == 1 and mesh.size() == dist.get_world_size(), mesh
        if self.shard_size not in (None, mesh.size()):
            mesh = self._hybrid(mesh)
        for unit in [*sharded_units(vlm), vlm]:
            fully_shard(unit, mesh=mesh, mp_policy=self._policy(unit))
        if any(parameter.is_meta for parameter in vlm.lm.parameters()):
            files = weight_map(llm.spec)
            assert files is not None
            read_weights(vlm.lm, files, torch.device(mesh.device_type))
        # A rank without images must gather the tower's and the projector's weights with the others, or all wait.
        vlm.every_unit = True
        for method in ("visual_tokens", "generate"):
            register_fsdp_forward_method(vlm, method)
        # transformers goes on generating on a rank that is done, until all are.
        vlm.lm._is_fsdp_managed_module = True  # type: ignore[assignment]

    def _policy(self, unit: nn.Module) -> MixedPrecisionPolicy:
        own = unit.compute_dtype if isinstance(unit, Projector) else None
        if own is None:
            return MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=self.reduce)
        return MixedPrecisionPolicy(param_dtype=own, reduce_dtype=self.reduce, output_dtype=self.compute)

    def _hybrid(self, mesh: DeviceMesh) -> DeviceMesh:
        """Groups of `shard_size` neighbours, which share a copy, by groups of those with the same part of it."""
        places = torch.arange(mesh.size()).view(-1, self.shard_size or mesh.size())
        # A mesh that makes its groups by itself gives them torch's own timeout, ten minutes under NCCL.
        groups: Any = [dist.new_subgroups_by_enumeration(g.tolist(), self.timeout)[0] for g in (places.T, places)]
        return DeviceMesh.from_group(groups, mesh.device_type, mesh=places, mesh_dim_names=("replicate", "shard"))


def sharded_units(vlm: VLM) -> list[nn.Module]:
    """Modules whose weights are gathered together, inner ones first: each block of the tower, the tower, each layer of
    the LLM, the projector. The rest (embeddings and the head, which may be tied) belongs to the whole model.

    prismatic-vlms wraps the same units.
    """
    units = [*vlm.backbone.blocks, vlm.backbone, *decoder_layers(vlm.lm), vlm.projector]
    return [unit for unit in units if next(unit.parameters(), None) is not None]


def reshard(vlm: nn.Module) -> None:
    """Frees gathered weights, so that parameters are shards again: after a validation the outermost ones are not."""
    for module in vlm.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, the shape of the whole tensor, and where the block begins in it."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def local_piece(tensor: Tensor) -> Piece:
    """This process's block of a tensor: its part of one that `fully_shard` divided, else all of it."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), shape, (0,) * len(shape))
    local = tensor.to_local().detach()
    expected, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    assert tuple(local.shape) == expected, "sharded in another way than fully_shard does"
    return Piece(local, shape, offset)


def piece_of(tensor: Tensor, rank: int) -> Piece | None:
    """What this process has to write of a tensor: each block is written once, and empty ones never."""
    if not isinstance(tensor, DTensor):
        return local_piece(tensor) if rank == 0 else None
    mesh = tensor.device_mesh
    copies = [mesh.get_local_rank(d) for d, p in enumerate(tensor.placements) if isinstance(p, Replicate)]
    piece = local_piece(tensor)
    return piece if not any(copies) and piece.tensor.numel() else None


@torch.no_grad()
def read_weights(lm: PreTrainedModel, files: Mapping[str, Path], device: torch.device) -> None:
    """Gives an LLM on the meta device, sharded or not, the weights of safetensors files.

    No process has more of the model in memory than its own part and one row block of a file.

    Args:
        files: the file of each tensor.

    Raises:
        UsageError: a weight is missing, or has another shape.
    """
    fill_buffers(lm)
    buffers = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    lm.to_empty(device=device)
    lm.tie_weights()  # the copies that `to_empty` makes are separate
    for name, buffer in lm.named_buffers():
        buffer.copy_(buffers[name])
    handles: dict[Path, Any] = {}
    for adapted, parameter in lm.named_parameters():
        if is_adapter(adapted):
            _draw(adapted, local_piece(parameter))
            continue
        name = base_name(adapted)
        if name not in files:
            raise UsageError(f"The language model's files are missing the weight {name}.")
        file = handles.setdefault(files[name], safe_open(files[name], "pt"))
        _read(name, file.get_slice(name), local_piece(parameter), lm.config.initializer_range)


def _read(name: str, stored: Any, piece: Piece, std: float) -> None:
    shape = tuple(stored.get_shape())
    added = piece.shape[0] - shape[0]
    # Tables have a row per token, and so has the head's bias: the tokenizer may need more of them or fewer.
    by_token = "embed" in name or "lm_head" in name
    if shape[1:] != piece.shape[1:] or (added and not by_token):
        raise UsageError(f"The weight {name} is {list(shape)} in its file and {list(piece.shape)} in the model.")
    if not piece.tensor.numel():
        return
    start, rows = piece.offset[0], piece.tensor.shape[0]
    there = max(0, min(rows, shape[0] - start))
    if there:
        piece.tensor[:there].copy_(stored[start : start + there])
    if there < rows and len(shape) == 1:
        piece.tensor[there:].zero_()
    elif there < rows:
        piece.tensor[there:].copy_(added_rows(added, piece.shape[1], std)[start + there - shape[0] :][: rows - there])


def _draw(name: str, piece: Piece) -> None:
    start = piece.offset[0]
    piece.tensor.copy_(draw_lora(name, piece.shape)[start : start + piece.tensor.shape[0]])
