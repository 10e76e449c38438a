"""Which part of a sharded tensor this process holds, and where it stands in the whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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
