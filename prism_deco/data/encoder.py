"""Conversations -> tokens, truncated to the limits on text tokens and positions."""

from __future__ import annotations

from typing import cast

import numpy as np

from prism_deco.data.records import Record, Records
from prism_deco.errors import UsageError
from prism_deco.llms import Encoded, LanguageModel, truncate
from prism_deco.llms.encoding import IGNORE, encode_segments


class Encoder:
    """Turns records into tokens and labels.

    Holds the tokenizer and the chat format but not the model, so that it can be sent to loader processes.

    Args:
        max_text_tokens: text is truncated to this many tokens; images are never truncated.
        max_positions: longest sequence of the LLM, visual tokens included; None is no limit.
        tokens_per_image: visual tokens M of one image.
        shorten: shorten a first question that leaves no room for its answer; otherwise such a record has no labels.
    """

    def __init__(
        self,
        llm: LanguageModel,
        *,
        max_text_tokens: int,
        max_positions: int | None = None,
        tokens_per_image: int = 0,
        shorten: bool = True,
    ):
        self.tokenizer = llm.tokenizer
        self._format = llm.prompt_format
        self._tokenize = llm.spec.tokenize
        self._max_text_tokens = max_text_tokens
        self._max_positions = max_positions
        self._tokens_per_image = tokens_per_image
        self._shorten = shorten

    def __call__(self, record: Record) -> tuple[Encoded, int]:
        """Like `fit(encode(record))`, but the `UsageError` names the record."""
        try:
            return self.fit(self.encode(record))
        except UsageError as error:
            raise UsageError(f"Record {record.id}: {error} data.on_bad_record=skip leaves such records out.") from error

    def encode(self, record: Record) -> Encoded:
        """All tokens of a record, without an unanswered last question: it has no loss, and nothing attends to it."""
        segments = self._format.render(record.answered, len(record.images))
        return encode_segments(segments, self.tokenizer, self._tokenize, self._format.image_slot)

    def fit(self, encoded: Encoded) -> tuple[Encoded, int]:
        """The truncated tokens, and the number of tokens cut off; `UsageError` if nothing can be learnt from them."""
        images = len(encoded.image_slots)
        room = self.room(images)
        if room < 2:
            raise UsageError(
                f"{images} images of {self._tokens_per_image} visual tokens leave no room for a question and an answer "
                f"in {self._max_positions} positions."
            )
        encoded, cut = truncate(encoded, room, shorten=self._shorten)
        if all(label == IGNORE for label in encoded.labels) and (self._shorten or not cut):
            raise UsageError("No token is supervised: there is nothing to learn from it.")
        return encoded, cut

    def room(self, images: int) -> int:
        """The most text tokens that a record with this many images can have."""
        if self._max_positions is None:
            return self._max_text_tokens
        return min(self._max_text_tokens, self._max_positions - self._tokens_per_image * images)

    def ignores(self, record: Record) -> bool:
        """Whether LLaVA masks all labels of the record: its length check fails after an unanswered last question."""
        return len(record.answered) < len(record.messages) and self._format.image_slot == "in_place"

    def placeholder(self) -> Encoded:
        """Takes the place of a record that cannot be encoded; has no labels."""
        token = cast(int, self.tokenizer.eos_token_id)
        return Encoded(input_ids=[token, token], labels=[IGNORE, IGNORE], rounds=[0, 0], image_slots=[])


def check_records(records: Records, encoder: Encoder) -> None:
    """Encodes the records most likely to fail, so that none of them stops a run hours later: odd ones, those with too
    many images, and the first with a system turn.
    """
    counts = np.unique(records.num_images)
    crowded = [count for count in counts.tolist() if encoder.room(count) < 2]
    suspects = records.column("odd") | np.isin(records.num_images, crowded)
    with_system = np.flatnonzero(records.column("system"))[:1]
    for row in [*with_system.tolist(), *np.flatnonzero(suspects).tolist()]:
        encoder(records[row])
