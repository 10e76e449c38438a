"""The tokens of an answer, and the words they form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from prism_deco.errors import UsageError
from prism_deco.inference import answer_ids
from prism_deco.llms import LanguageModel
from prism_deco.llms.encoding import Encoded, answers_only
from prism_deco.sequence import sequence_length

# Decoders write this for bytes that do not form a whole character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Word(NamedTuple):
    """A word of an answer and the indices of its tokens."""

    text: str
    tokens: tuple[int, ...]


def encode_answer(llm: LanguageModel, prompt: str, answer: str, visual_tokens: int) -> tuple[Encoded, list[int]]:
    """The conversation, and the ids of the answer's tokens, which are the first supervised ones.

    The token that ends the answer and whitespace before it are excluded, as they say nothing about the image.

    Raises:
        UsageError: the answer is empty, or the text too long.
    """
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    encoded = answers_only(llm.encode(messages, num_images=1))
    try:
        ids = answer_ids(llm, encoded)
    except UsageError as error:
        raise UsageError(f"{error} There is nothing to explain: give an answer, or ask something else.") from error
    length = sequence_length(encoded, visual_tokens)
    if length > llm.max_positions:
        raise UsageError(
            f"Question, answer and image take {length} positions, the LLM has {llm.max_positions}: shorten the text."
        )
    return encoded, ids


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds; joined, they are the decoded text.

    Each is the difference of two decoded prefixes: decoded alone, tokens lose their leading space (SentencePiece) or
    are not valid text (single bytes of a character).
    """
    texts: list[str] = []
    done = ""
    for end in range(1, len(ids) + 1):
        # Spaces before punctuation stay: cleaning them up would make a prefix differ from the whole.
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        # The character is counted with the token that completes it. Nothing can complete the last token.
        if end < len(ids) and text.endswith(_INCOMPLETE):
            texts.append("")
            continue
        texts.append(text[len(done) :])
        done = text
    return texts


def merge_words(texts: Sequence[str]) -> list[Word]:
    """Words separated by whitespace; a token that overlaps two words belongs to both.

    Whitespace tokens belong to no word; a token without text (the first bytes of a character) belongs to the word that
    continues there.
    """
    ends = []
    position = 0
    for text in texts:
        position += len(text)
        ends.append(position)
    # Token k covers the characters starts[k] to ends[k] of the joined text; none if both are equal.
    starts = [0, *ends[:-1]]
    words = []
    for match in re.finditer(r"\S+", "".join(texts)):
        first, last = match.span()
        inside = [
            k
            for k, (start, end) in enumerate(zip(starts, ends, strict=True))
            if (start < last and end > first) or (start == end and first <= start < last)
        ]
        words.append(Word(match.group(), tuple(inside)))
    return words
