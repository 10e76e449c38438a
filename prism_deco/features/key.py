"""What identifies a cache of features, and how much room it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from prism_deco.backbones.transforms import BackboneTransform

FORMAT = 1
"""Goes up with every change of what is stored, so that no old cache passes for a new one."""

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.bfloat16}
"""Ways in which a tower computes, and the type that its features are kept in. Under autocast to bfloat16 its residual
stream is float32: the cache holds that rounded, as the next matrix product would round it. A projector that begins
with a matrix product sees the same bits; one that begins with a norm sees its input rounded."""

BATCH = 32
"""Images that the tower is given at a time. Matrix kernels may round otherwise for other batches: with a fixed size,
and shards of whole batches, a feature does not depend on who computed it."""

_LARGEST_SHARD = 2**28
_MOST_ROWS = 512
_PLACE = ("weights", "pretrained", "hub", "file", "file_gb")
"""Keys of a backbone that say where its weights come from; their hash says what they are."""

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Key:
    """What two runs must have in common to share features.

    Attributes:
        backbone: the `backbone` group: architecture, image size, layer, resize.
        weights: `backbone.sha256()`.
        transform: of the backbone.
        data: `Records.data_hash` of the file of records.
        images: `names_hash` of the images that are stored.
        least_side: at which they are decoded, see `data.images.decode_image`.
        compute: one of `COMPUTE`.
        pooling: how features are pooled before they are stored (`Projector.pooling`); None stores all patches.
        grid: grid of the stored features.
    """

    backbone: Mapping[str, Any]
    weights: str
    transform: BackboneTransform
    data: str
    images: str
    least_side: int | None
    compute: str
    pooling: str | None
    grid: tuple[int, int]

    @cached_property
    def content(self) -> dict[str, Any]:
        """All of it as JSON."""
        backbone = {name: value for name, value in self.backbone.items() if name not in _PLACE}
        return json.loads(json.dumps({"format": FORMAT} | asdict(self) | {"backbone": backbone}))

    @property
    def digest(self) -> str:
        """The name of the cache's folder."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]


def names_hash(names: Sequence[str]) -> str:
    """SHA-256 of the images' names in their order."""
    return hashlib.sha256("\0".join(names).encode()).hexdigest()


@dataclass(frozen=True)
class Layout:
    """How the features of `images` images lie in shards: each a safetensors file of one tensor, dtype[n, T, D].

    Attributes:
        tokens: features T of an image.
        dim: channels D.
        dtype: float32 | bfloat16.
    """

    images: int
    tokens: int
    dim: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of one image."""
        return self.tokens * self.dim * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Images of a shard; the last one may have fewer."""
        return max(BATCH, min(_MOST_ROWS, _LARGEST_SHARD // self.row_bytes) // BATCH * BATCH)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.rows)

    def rows_of(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.rows, min((shard + 1) * self.rows, self.images))

    def header(self, shard: int) -> bytes:
        """What the shard's file begins with."""
        shape = [len(self.rows_of(shard)), self.tokens, self.dim]
        tensor = {"dtype": _NAMES[self.dtype], "shape": shape, "data_offsets": [0, shape[0] * self.row_bytes]}
        text = json.dumps({"features": tensor}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def size(self, shard: int) -> int:
        """Bytes of the shard's file."""
        return len(self.header(shard)) + len(self.rows_of(shard)) * self.row_bytes

    @property
    def bytes(self) -> int:
        """Of all shards; their records take some hundred bytes each besides."""
        if not self.images:
            return 0
        return (self.shards - 1) * self.size(0) + self.size(self.shards - 1)
