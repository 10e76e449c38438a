"""The records that `bench train` trains on: random tokens and pixels in the lengths of the real mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prism_deco.bench.hf_llava import image_token
from prism_deco.bench.lengths import encode, sample
from prism_deco.llms.encoding import Encoded
from prism_deco.sequence import Batch, build_batch, sequence_length
from prism_deco.vlm import VLM

Group = list[tuple[Encoded, dict[str, Tensor] | None]]
"""The records of one forward pass, with the pixels (per tower float[3, S, S]) of those that have an image."""


def draw_pool(vlm: VLM, *, batch_size: int, steps: int, max_text_tokens: int, seed: int) -> list[Group]:
    """Global batches of records with the lengths of the real mixture, in random order."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    records: Group = []
    for shape in sample(batch_size * steps, seed):
        encoded = encode(shape, image_token(vlm), rng, max_text_tokens=max_text_tokens)
        side = vlm.backbone.image_size
        pixels = {tower: torch.randn(3, side, side, generator=generator) for tower in vlm.backbone.towers}
        records.append((encoded, pixels if shape.image else None))
    return [records[i : i + batch_size] for i in range(0, len(records), batch_size)]


def build_batches(vlm: VLM, groups: Sequence[Group], device: torch.device, *, pack: bool) -> list[Batch]:
    """A forward pass for each group, padded or packed, on the device."""
    batches = []
    for members in groups:
        images = [pixels for _, pixels in members if pixels is not None]
        stacked = {tower: torch.stack([p[tower] for p in images]) for tower in vlm.backbone.towers} if images else None
        encoded = [e for e, _ in members]
        names = [str(i) for i in range(len(members))]
        batch = build_batch(encoded, vlm.projector.num_tokens, pixels=stacked, pack=pack, ids=names)
        batches.append(batch.to(device))
    return batches


def by_length(groups: Sequence[Group], tokens_per_image: int) -> list[Group]:
    """The same records regrouped by length, images included: padding at its least."""
    size = len(groups[0])
    ordered = sorted(
        (record for group in groups for record in group), key=lambda r: -sequence_length(r[0], tokens_per_image)
    )
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
