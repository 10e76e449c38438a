"""Which part of a sharded tensor this process holds, and where it stands in the whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Piece:
    """A block of a tensor.

    Attributes:
        tensor: the block itself.
        shape: of the whole tensor.
        offset: where the block begins in it.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def local_piece(tensor: Tensor) -> Piece:
    """This process's block of a tensor: its rows of one that `fully_shard` divided, else all of it."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), shape, (0,) * len(shape))
    local = tensor.to_local().detach()
    offset = [0] * len(shape)
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            # `torch.chunk`'s rule, which is also that of `fully_shard`: all blocks but the last ones are equal.
            size = -(-shape[placement.dim] // tensor.device_mesh.size(dimension))
            start = size * tensor.device_mesh.get_local_rank(dimension)
            offset[placement.dim] = min(start, shape[placement.dim])
            expected = min(size, shape[placement.dim] - offset[placement.dim])
            assert local.shape[placement.dim] == expected, "sharded in another way than fully_shard does"
    return Piece(local, shape, tuple(offset))


def piece_of(tensor: Tensor, rank: int) -> Piece | None:
    """What this process has to write of a tensor: each block is written once, and empty ones never."""
    if not isinstance(tensor, DTensor):
        return local_piece(tensor) if rank == 0 else None
    mesh = tensor.device_mesh
    copies = [mesh.get_local_rank(d) for d, p in enumerate(tensor.placements) if isinstance(p, Replicate)]
    piece = local_piece(tensor)
    return piece if not any(copies) and piece.tensor.numel() else None
