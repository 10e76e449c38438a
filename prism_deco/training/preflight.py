"""What would spoil a run without ending it, looked for before time is spent.

Labels that miss the answers, a projector that no gradient reaches, images that the model ignores and weights that do
not come back from disk all leave a loss that falls. Each is seen on a few records within seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from prism_deco.data.examples import Example
from prism_deco.data.records import Record
from prism_deco.llms import Encoded, LanguageModel
from prism_deco.llms.encoding import IGNORE
from prism_deco.llms.prompts import IMAGE_TAG
from prism_deco.llms.tuning import tuning
from prism_deco.training.datamodule import Conversations
from prism_deco.training.preflight_checks import Checks, failed, modes_kept
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

RECORDS = 8
SHOWN = 3
"""Records whose supervised text is logged."""


def preflight(
    config: DictConfig, folder: Path, vlm: VLM, llm: LanguageModel, data: Conversations, device: torch.device
) -> None:
    """Checks labels, gradients, learning, the use of images, and saving; the model is afterwards what it was.

    1. The supervised tokens of each record decode to text of its answers.
    2. The first gradient of the projector and of the LLM, where they are trained, is finite and not zero.
    3. Ten steps of AdamW at the recipe's learning rates lower the loss of eight records.
    4. With the images of other records the loss is another one. That it is higher holds once a model has learned to
       look; few steps from random weights may not get there, so that a lower one is a warning.
    5. The model, with what these steps taught it, gives the same logits after saving and loading.

    Sharded training has the whole model on no device: there, only the labels are checked. Four-bit weights are
    loaded as what they were quantised from, and leave out the last check.

    Args:
        config: of the run.
        folder: of the run; what is saved goes there for a moment.
        vlm: on the CPU; only a model with four-bit weights stays on the device.
        device: where the run trains. It needs the memory of training, and no more.

    Raises:
        UsageError: a check failed; it is named, with what was found.
    """
    started = time.monotonic()
    with isolate_rng(include_cuda=device.type == "cuda"):
        examples = _checked_examples(data, llm)
        if config.trainer.strategy == "fsdp":
            log.info("Preflight: labels are right; no device holds the whole of a sharded model for the other checks")
            return
        with _unchanged(vlm):
            checks = Checks(config, vlm.to(device), data, examples, device)
            checks.learning()
            if not config.recipe.blind:
                checks.images()
            if tuning(config.recipe.lm).quantize is None:
                vlm.to("cpu")
                checks.saving(folder / "preflight", llm)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    log.info("Preflight passed in %.1f s", time.monotonic() - started)


def _checked_examples(data: Conversations, llm: LanguageModel) -> list[Example]:
    """Records evenly spread over those with images (over all if none has any), once their labels are checked."""
    pool = np.flatnonzero(data.train_records.has_image)
    pool = pool if len(pool) else np.arange(len(data.train_records))
    indices = pool[np.linspace(0, len(pool) - 1, min(RECORDS, len(pool))).astype(int)].tolist()
    examples = []
    for index in indices:
        example, record = data.train_examples[index], data.train_records[index]
        if example.bad_images or example.bad_record:
            continue
        text = _check_labels(example.encoded, record, llm)
        examples.append(example)
        if len(examples) <= SHOWN:
            log.info("Preflight: record %s teaches %r", record.id, text)
    if not examples:
        raise failed("labels", f"none of {len(indices)} records has images that can be read")
    return examples


def _check_labels(encoded: Encoded, record: Record, llm: LanguageModel) -> list[str]:
    """The supervised stretches of a record as text. White space and special tokens do not count."""

    def decode(tokens: list[int]) -> str:
        return str(llm.tokenizer.decode(tokens, skip_special_tokens=True))

    runs = groupby(encoded.labels, key=lambda label: label != IGNORE)
    learned = [decode(list(run)) for supervised, run in runs if supervised]
    if not learned:
        raise failed("labels", f"record {record.id} has no supervised token")
    # Through the tokenizer, too: it may change letters (normalisation, unknown ones).
    answers = [m["content"].replace(IMAGE_TAG, "") for m in record.messages if m["role"] == "assistant"]
    known = "".join(_bare(decode(llm.tokenizer(a, add_special_tokens=False)["input_ids"])) for a in answers)
    for text in learned:
        # A cut may go through a character of several tokens.
        if _bare(text).rstrip("\ufffd") not in known:
            raise failed("labels", f"record {record.id} would teach {text!r}, its answers are {answers}")
    return learned


def _bare(text: str) -> str:
    return "".join(text.split())


@contextmanager
def _unchanged(vlm: VLM) -> Iterator[None]:
    """Gives trained weights and buffers their values back, which wait on the CPU, and modules their modes."""

    def changing() -> list[Tensor]:
        return [*(p for p in vlm.parameters() if p.requires_grad), *vlm.buffers()]

    saved = [tensor.detach().to("cpu", copy=True) for tensor in changing()]
    try:
        with modes_kept(vlm):
            yield
    finally:
        vlm.zero_grad(set_to_none=True)
        with torch.no_grad():
            # Moving a model replaces its buffers: these are others than before.
            for tensor, value in zip(changing(), saved, strict=True):
                tensor.copy_(value)
