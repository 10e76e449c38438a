"""Lengths of a data set's sequences, from its files if they are on disk, else from the statistics in its YAML."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from omegaconf import DictConfig

from prism_deco.build import group, record_options
from prism_deco.config import cache_dir
from prism_deco.data import build_source
from prism_deco.data.records import Records, open_parts
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel
from prism_deco.plan.meta_models import llm_of

log = logging.getLogger(__name__)

SAMPLE = 200
"""Records to tokenise for the number of tokens per word."""

TOKENS_PER_WORD, SUPERVISED = 1.4, 0.5
"""Assumed if the LLM's tokenizer is not available."""


@dataclass(frozen=True)
class Sequences:
    """Lengths of a data set's text in tokens of the LLM, with its chat format and before truncation.

    Attributes:
        records: records to train on.
        images: records with an image.
        text: mean tokens per record.
        supervised: mean supervised tokens per record.
        longest_text: tokens of the longest record.
        longest_supervised: mean supervised tokens per record in the forward pass with the longest record.
        lengths: float[records], tokens of each; None if the files are not on disk.
        source: of these numbers: measured | words (counted, not tokenised) | estimate (from the YAML).
    """

    records: int
    images: int
    text: float
    supervised: float
    longest_text: float
    longest_supervised: float
    source: str
    lengths: np.ndarray | None = None


def sequences_of(config: DictConfig) -> tuple[Sequences, str | None]:
    """The configured data set's lengths, and the problem with its files, if any.

    Raises:
        UsageError: there are neither files nor statistics, or training would refuse the records.
    """
    statistics = config.data.statistics
    if statistics is not None and "root" not in config.data:
        return _estimate(config), None  # the data is generated on first use
    try:
        source = build_source(group(config, "data"))
    except UsageError as error:
        if statistics is None:
            raise
        return _estimate(config), str(error)
    # Opened as in training, which raises what training would raise.
    parts = open_parts(source, cache_dir(), **record_options(config))
    records = parts.records.select(slice(config.data.limit))
    return _measure(records, llm_of(config), config.recipe.micro_batch_size), None


def _estimate(config: DictConfig) -> Sequences:
    known = config.data.statistics
    images = known.images * known.get("records_per_image", 1)
    records = images + known.get("text_records", 0)
    # The fraction of the records that data.limit keeps.
    limit = min(1.0, (config.data.limit or records) / records)
    return Sequences(
        records=round(records * limit),
        images=round(images * limit),
        text=known.text_tokens,
        supervised=known.supervised_tokens,
        longest_text=known.longest_text_tokens,
        longest_supervised=known.longest_supervised_tokens,
        source="estimate",
    )


def _measure(records: Records, llm: LanguageModel, micro_batch_size: int) -> Sequences:
    try:
        per_word, supervised = _tokens_per_word(records, llm)
        source = "measured"
    except UsageError as error:
        log.warning("Estimating lengths from word counts, because records cannot be tokenised: %s", error)
        per_word, supervised = TOKENS_PER_WORD, SUPERVISED
        source = "words"
    lengths = per_word * records.words
    # The worst case: the longest records meet in one forward pass.
    longest = np.sort(lengths)[-micro_batch_size:]
    return Sequences(
        records=len(records),
        images=int(records.has_image.sum()),
        text=float(lengths.mean()),
        supervised=supervised * float(lengths.mean()),
        longest_text=float(longest.max()),
        longest_supervised=supervised * float(longest.mean()),
        source=source,
        lengths=lengths,
    )


def _tokens_per_word(records: Records, llm: LanguageModel) -> tuple[float, float]:
    """Tokens per word, chat format included, and the supervised fraction of them."""
    words, tokens, supervised = 0, 0, 0
    # Evenly spaced, so that every part of the file counts.
    for index in np.linspace(0, len(records) - 1, min(SAMPLE, len(records))).astype(int).tolist():
        record = records[index]
        encoded = llm.encode(record.answered, len(record.images))
        words += int(records.words[index])
        tokens += len(encoded.input_ids)
        # Positions without a label have a negative one.
        supervised += sum(label >= 0 for label in encoded.labels)
    return tokens / max(words, 1), supervised / max(tokens, 1)
