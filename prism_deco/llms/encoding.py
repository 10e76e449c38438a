"""Tokenises segments into ids and labels, and truncates them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from prism_deco.errors import UsageError
from prism_deco.llms.prompts import Segment

IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation, before visual tokens are inserted.

    Attributes:
        input_ids: token ids.
        labels: the token id where it is supervised, -100 elsewhere.
        rounds: `Segment.round` of each token.
        image_slots: for each image, the index in `input_ids` before which its visual tokens are inserted.
        headers: indices of supervised tokens that precede an answer and are part of its prompt.
    """

    input_ids: list[int]
    labels: list[int]
    rounds: list[int]
    image_slots: list[int]
    headers: frozenset[int] = frozenset()


def encode_segments(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, tokenize: str, image_slot: str
) -> Encoded:
    """Tokenises a rendered conversation.

    Args:
        tokenize: "per_turn" tokenises each turn separately (PRISM); "whole" tokenises all text between two image slots
            at once (LLaVA). A token belongs to the segment of its last character.
        image_slot: see `PromptFormat`; with "after_first_token", all rounds share the first token.
    """
    encoded = Encoded([], [], [], [])
    headers: list[int] = []
    for chunk in _chunks(segments, tokenize):
        if chunk[0].image:
            encoded.image_slots.append(len(encoded.input_ids))
            continue
        text = "".join(segment.text for segment in chunk)
        # The template already contains the special tokens. `verbose` would warn about long texts, truncated later.
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=len(chunk) > 1, verbose=False)
        if len(chunk) == 1:
            owners = chunk * len(tokens["input_ids"])
        else:
            of_characters = [segment for segment in chunk for _ in segment.text]
            owners = [of_characters[max(end - 1, begin)] for begin, end in tokens["offset_mapping"]]
        for token, segment in zip(tokens["input_ids"], owners, strict=True):
            if segment.header:
                headers.append(len(encoded.input_ids))
            encoded.input_ids.append(token)
            encoded.labels.append(token if segment.supervised else IGNORE)
            encoded.rounds.append(segment.round)
    if image_slot == "after_first_token":
        encoded.rounds[:1] = [0]
        encoded = replace(encoded, image_slots=[1] * len(encoded.image_slots))
    return replace(encoded, headers=frozenset(headers))


def truncate(encoded: Encoded, max_text_tokens: int, *, shorten: bool = True) -> tuple[Encoded, int]:
    """Truncates a conversation to `max_text_tokens`; returns it and the number of tokens removed.

    The end is cut, as in PRISM. If that would leave no supervised token and `shorten` is set, the middle of the first
    question is cut instead, and the end of its answer if that takes more than half of the tokens.
    """
    if max_text_tokens < 2:
        raise UsageError(f"max_text_tokens={max_text_tokens} leaves no room for a question and an answer.")
    length = len(encoded.input_ids)
    if length <= max_text_tokens:
        return encoded, 0
    first = next((i for i, label in enumerate(encoded.labels) if label != IGNORE), length)
    if first < max_text_tokens or first == length or not shorten:
        return _keep(encoded, range(max_text_tokens)), length - max_text_tokens
    last = next((i for i in range(first, length) if encoded.labels[i] == IGNORE), length)
    answer = min(last - first, max_text_tokens // 2)
    prompt = max_text_tokens - answer
    tail = prompt // 2  # the end of the prompt announces the answer
    kept = [*range(prompt - tail), *range(first - tail, first + answer)]
    return _keep(encoded, kept), length - max_text_tokens


def prompt_of(encoded: Encoded) -> Encoded:
    """The tokens before the last answer: the prompt that generates it."""
    labels = encoded.labels
    start = len(labels)
    while start and labels[start - 1] == IGNORE:
        start -= 1
    last = encoded.rounds[start - 1] if start else 0
    while start and _is_answer(encoded, start - 1) and encoded.rounds[start - 1] == last:
        start -= 1
    kept = _keep(encoded, range(start))
    return Encoded(kept.input_ids, [IGNORE] * start, kept.rounds, kept.image_slots)


def answers_only(encoded: Encoded) -> Encoded:
    """The conversation with only the answers labelled, not their headers."""
    labels = [label if _is_answer(encoded, i) else IGNORE for i, label in enumerate(encoded.labels)]
    return replace(encoded, labels=labels, headers=frozenset())


def _is_answer(encoded: Encoded, index: int) -> bool:
    return encoded.labels[index] != IGNORE and index not in encoded.headers


def _chunks(segments: Sequence[Segment], tokenize: str) -> Iterator[list[Segment]]:
    """Groups of segments that are tokenised together: an image slot, or text."""
    if tokenize == "per_turn":
        turn: list[Segment] = []
        for segment in segments:
            turn.append(segment)
            if not segment.header:  # a header belongs to its answer's turn
                yield turn
                turn = []
        if turn:
            yield turn
        return
    # Round 0 is the BOS token, which is tokenised separately (see `PromptFormat`).
    for (image, _), group in groupby(segments, key=lambda s: (s.image, s.round == 0)):
        chunk = list(group)
        if not image:
            yield chunk
            continue
        for slot in chunk:
            yield [slot]


def _keep(encoded: Encoded, kept: Sequence[int]) -> Encoded:
    # Images are never cut: a slot within removed text moves to where that text was.
    slots = [sum(index < slot for index in kept) for slot in encoded.image_slots]
    return Encoded(
        [encoded.input_ids[i] for i in kept],
        [encoded.labels[i] for i in kept],
        [encoded.rounds[i] for i in kept],
        slots,
        frozenset(new for new, old in enumerate(kept) if old in encoded.headers),
    )
