"""The layout of text and visual tokens in a batch of sequences.

Nothing else depends on the number of visual tokens per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prism_deco.llms.encoding import IGNORE, Encoded


@dataclass
class Batch:
    """One micro-batch: B sequences padded to L positions, or several packed into a single row of L positions.

    Attributes:
        input_ids: int64[B, L]; 0 at visual positions and padding.
        labels: int64[B, L]; the token id at supervised positions, -100 elsewhere.
        visual: bool[B, L]; True at visual positions, which the images fill in row-major order.
        attention_mask: bool[B, L]; False at padding.
        position_ids: int64[B, L].
        rounds: int64[B, L]; conversation round of each position, 0 for the prefix that all rounds share.
        pixels: per tower float[I, 3, S, S], the batch's I images; None in an all-text batch.
        ids: ids of the records, for error messages.
        lengths: positions of each packed sequence (B is 1); None if not packed.
        left_padded: whether padding precedes the text, where causal attention would see it.
        tokens_per_image: visual tokens M of each image; None is the projector's default.
        targets: int64[K]; supervised positions that have a predecessor to be predicted from, as indices into the
            flattened labels. Computed from the labels if not given: on the CPU, since their number K would require
            synchronising with a GPU.
    """

    input_ids: Tensor
    labels: Tensor
    visual: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    rounds: Tensor
    pixels: dict[str, Tensor] | None = None
    ids: tuple[str, ...] = ()
    lengths: tuple[int, ...] | None = None
    left_padded: bool = False
    tokens_per_image: int | None = None
    targets: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.targets is None:
            rows, positions = (self.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
            self.targets = rows * self.labels.shape[1] + positions + 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (Lightning calls this). Page-locked memory is copied to a GPU in the
        background."""
        non_blocking = torch.device(device).type == "cuda"
        return Batch(**tree_map_only(Tensor, lambda value: value.to(device, non_blocking=non_blocking), vars(self)))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the DataLoader calls this)."""
        return Batch(**tree_map_only(Tensor, Tensor.pin_memory, vars(self)))


def sequence_length(encoded: Encoded, tokens_per_image: int) -> int:
    """Positions of a conversation, including its images."""
    return len(encoded.input_ids) + len(encoded.image_slots) * tokens_per_image


def build_batch(
    encoded: Sequence[Encoded],
    tokens_per_image: int,
    *,
    pixels: dict[str, Tensor] | None = None,
    restart_rounds: bool = False,
    left_pad: bool = False,
    pack: bool = False,
    ids: Sequence[str] = (),
) -> Batch:
    """Lays out conversations and the visual tokens of their images.

    Args:
        encoded: the tokenised conversations.
        tokens_per_image: visual tokens M of one image.
        pixels: the images, in the order of the conversations and of their slots.
        restart_rounds: number the positions of every round from the end of the shared prefix, for
            `turn_mask=block`, where a round does not see the rounds before it.
        left_pad: pad on the left (generation) instead of the right (training).
        pack: concatenate the conversations into a single row, without padding. The model's attention must respect
            `lengths`.
    """
    lengths = tuple(sequence_length(e, tokens_per_image) for e in encoded)
    length = sum(lengths) if pack else max(lengths)
    shape = (1 if pack else len(encoded), length)
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    visual = torch.zeros(shape, dtype=torch.bool)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    # Position ids continue into right padding: transformers takes a jump for the start of another packed sequence.
    position_ids = torch.arange(length).repeat(shape[0], 1)
    rounds = torch.zeros(shape, dtype=torch.long)
    for number, (example, n) in enumerate(zip(encoded, lengths, strict=True)):
        text = _text_positions(example, tokens_per_image)
        row = 0 if pack else number
        start = sum(lengths[:number]) if pack else length - n if left_pad else 0
        at = text + start
        input_ids[row, at] = torch.tensor(example.input_ids)
        labels[row, at] = torch.tensor(example.labels)
        labels[row, start] = IGNORE  # no position predicts the first token
        visual[row, start : start + n] = True
        visual[row, at] = False
        attention_mask[row, start : start + n] = True
        # A visual token belongs to the round of the text before it (0 right after BOS).
        text_rounds = torch.tensor(example.rounds)
        before = (torch.searchsorted(text, torch.arange(n), right=True) - 1).clamp(min=0)
        rounds[row, start : start + n] = text_rounds[before]
        position_ids[row, start : start + n] = torch.arange(n)
        if restart_rounds:
            position_ids[row, start : start + n] = _restarted(rounds[row, start : start + n])
    shared = lengths if pack else None
    return Batch(
        *(input_ids, labels, visual, attention_mask, position_ids, rounds),
        pixels=pixels,
        ids=tuple(ids),
        lengths=shared,
        left_padded=left_pad,
        tokens_per_image=tokens_per_image,
    )


def _text_positions(encoded: Encoded, tokens_per_image: int) -> Tensor:
    """int64[len(input_ids)]: the position of each text token after visual tokens are inserted."""
    index = torch.arange(len(encoded.input_ids))
    slots = torch.tensor(encoded.image_slots, dtype=torch.long)
    images_before = (slots[None, :] <= index[:, None]).sum(dim=1)
    return index + images_before * tokens_per_image


def _restarted(rounds: Tensor) -> Tensor:
    """int64[n]: position ids of one sequence whose rounds are int64[n], each numbered from the end of the prefix."""
    positions = torch.arange(len(rounds))
    shared = int((rounds == 0).sum())
    first = torch.searchsorted(rounds, rounds)  # rounds never decrease: index of a round's first token
    return torch.where(rounds == 0, positions, positions - first + shared)
