"""Checks a run for silent failures before it spends time.

The loss still falls if labels miss the answers, no gradient reaches the projector, the model ignores images, or weights
are not restored from disk. A few records reveal each of these within seconds.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from prism_deco.data.loader import Example
from prism_deco.data.records import Record
from prism_deco.errors import UsageError
from prism_deco.llms import Encoded, LanguageModel
from prism_deco.llms.encoding import IGNORE, answers_only
from prism_deco.llms.prompts import IMAGE_TAG
from prism_deco.llms.tuning import tuning
from prism_deco.sequence import Batch
from prism_deco.tensors import is_adapter
from prism_deco.training.datamodule import Conversations
from prism_deco.training.model_folder import adapter_dtype, load_model, save_model
from prism_deco.training.optim import adamw, grad_norm
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

RECORDS = 8
STEPS = 10


def preflight(
    config: DictConfig, folder: Path, vlm: VLM, llm: LanguageModel, data: Conversations, device: torch.device
) -> None:
    """Checks labels, gradients, learning, the use of images, and saving; leaves the weights unchanged.

    1. The supervised tokens of each record decode to text of its answers.
    2. The first gradients of the tower, the projector and the LLM, as far as they are trained, are finite and not zero.
    3. Ten steps of AdamW at the recipe's learning rates lower the loss of eight records.
    4. Black images change the loss.
    5. After these steps, saving and loading the model leaves its logits the same.

    In sharded training no device holds the whole model, so only the labels are checked. Models with four-bit weights
    skip the last check: loading gives the weights that they were quantised from.

    Args:
        folder: the run's; the model is saved there temporarily.
        vlm: on the CPU, and left there unless it has four-bit weights.
        device: that the run trains on; the checks take no more memory than training.

    Raises:
        UsageError: names the check that failed, and what it found.
    """
    with isolate_rng(include_cuda=device.type == "cuda"):
        examples = _checked_examples(data, llm)
        if config.trainer.strategy == "fsdp":
            log.info(
                "Preflight: labels are correct; the other checks need the whole model on one device and are skipped"
            )
            return
        with _unchanged(vlm):
            checks = _Checks(config, vlm.to(device), data, examples, device)
            checks.learning()
            if not config.recipe.blind:
                checks.images()
            if tuning(config.recipe.lm).quantize is None:
                vlm.to("cpu")
                checks.saving(folder / "preflight", llm)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    log.info("Preflight passed")


def _failed(check: str, found: str) -> UsageError:
    return UsageError(f"Preflight, {check}: {found}. Set trainer.preflight=false to train anyway.")


def _checked_examples(data: Conversations, llm: LanguageModel) -> list[Example]:
    """Examples evenly spaced over the records with images (over all if none has any), with checked labels."""
    pool = np.flatnonzero(data.train_records.has_image)
    if not len(pool):
        pool = np.arange(len(data.train_records))
    indices = pool[np.linspace(0, len(pool) - 1, min(RECORDS, len(pool))).astype(int)].tolist()
    examples = []
    for index in indices:
        example = data.train_examples[index]
        # With `recipe.long_questions=cut`, a question may leave no room for its answer.
        answers_cut = example.tokens_cut > 0 and all(label == IGNORE for label in example.encoded.labels)
        if not (example.bad_images or example.bad_record or answers_cut):
            _check_labels(example.encoded, data.train_records[index], llm)
            examples.append(example)
    if not examples:
        raise _failed("labels", f"none of {len(indices)} records has readable images and room for an answer")
    return examples


def _check_labels(encoded: Encoded, record: Record, llm: LanguageModel) -> None:
    """Compares the supervised spans of a record with its answers, ignoring white space and special tokens."""

    def decode(tokens: list[int]) -> str:
        return str(llm.tokenizer.decode(tokens, skip_special_tokens=True))

    if all(label == IGNORE for label in encoded.labels):
        raise _failed("labels", f"record {record.id} has no supervised token")
    runs = groupby(answers_only(encoded).labels, key=lambda label: label != IGNORE)
    learned = [decode(list(run)) for is_supervised, run in runs if is_supervised]
    log.info("Preflight: record %s is supervised on %r", record.id, learned)
    answers = [m["content"].replace(IMAGE_TAG, "") for m in record.messages if m["role"] == "assistant"]
    # The answers as the tokenizer decodes them: it may change characters (normalisation, unknown tokens).
    known = "".join(_bare(decode(llm.tokenizer(a, add_special_tokens=False)["input_ids"])) for a in answers)
    for text in learned:
        # A cut may split a character that takes several tokens.
        if _bare(text).rstrip("\ufffd") not in known:
            raise _failed("labels", f"record {record.id} would be supervised on {text!r}, its answers are {answers}")


def _bare(text: str) -> str:
    return "".join(text.split())


@contextmanager
def _unchanged(vlm: VLM) -> Iterator[None]:
    """Restores trained weights and buffers afterwards, from copies on the CPU."""

    def changing() -> list[Tensor]:
        return [*(p for p in vlm.parameters() if p.requires_grad), *vlm.buffers()]

    saved = [tensor.detach().to("cpu", copy=True) for tensor in changing()]
    try:
        yield
    finally:
        vlm.zero_grad(set_to_none=True)
        with torch.no_grad():
            # Look the tensors up again: moving a model replaces its buffers.
            for tensor, value in zip(changing(), saved, strict=True):
                tensor.copy_(value)


@dataclass(frozen=True)
class _Checks:
    """The checks that run the model; expects it on `device`."""

    config: DictConfig
    vlm: VLM
    data: Conversations
    examples: list[Example]
    device: torch.device

    def learning(self) -> None:
        """Checks the gradients, and that the loss falls."""
        recipe, vlm = self.config.recipe, self.vlm
        batches = self.data.collate(self.examples).batches
        optimizer = adamw(vlm, recipe)
        targets = sum(len(batch.targets) for batch in batches)
        before = sum(self._losses(batches)) / targets
        vlm.train()
        for step in range(STEPS):
            optimizer.zero_grad()
            for batch in batches:
                with self._precision():
                    loss = vlm(batch.to(self.device)).total / targets
                if loss.requires_grad:
                    loss.backward()
            if step == 0:
                self._check_gradients()
            if recipe.grad_clip > 0:
                nn.utils.clip_grad_norm_(vlm.parameters(), recipe.grad_clip)
            optimizer.step()
        after = sum(self._losses(batches)) / targets
        found = f"{STEPS} steps at recipe.lr={recipe.lr} change the loss of {len(self.examples)} records"
        if not after < before:
            raise _failed("learning", f"{found} from {before:.6g} to {after:.6g}; it must fall")
        log.info("Preflight: %s from %.4f to %.4f", found, before, after)

    def _check_gradients(self) -> None:
        # Norms of whole parts: single gradients may legitimately be zero at first (a LoRA's A while its B is zero).
        parts = {"LLM": self.vlm.lm}
        if not self.config.recipe.blind and any(example.pixels for example in self.examples):
            parts = {"tower": self.vlm.backbone, "projector": self.vlm.projector} | parts
        for name, part in parts.items():
            norm = float(grad_norm(part.parameters()))
            if any(p.requires_grad for p in part.parameters()) and not (math.isfinite(norm) and norm > 0):
                raise _failed("gradient", f"the norm of the {name}'s first gradient is {norm}; it must be above 0")

    def images(self) -> None:
        """Checks that black images change the loss."""
        black = []
        for example in self.examples:
            pixels = [{tower: torch.zeros_like(image) for tower, image in one.items()} for one in example.pixels]
            black.append(replace(example, pixels=pixels))
        own = self._losses(self.data.collate(self.examples).batches)
        other = self._losses(self.data.collate(black).batches)
        if own == other and any(example.pixels for example in self.examples):
            found = "the loss is bitwise the same with black images: the model ignores images"
            raise _failed("images", f"{found} (if that is intended: recipe.blind=true)")
        log.info("Preflight: the loss with black images is %.4g times as high", sum(other) / sum(own))

    def saving(self, folder: Path, llm: LanguageModel) -> None:
        """Checks that saving and loading keeps the logits, on the CPU, where equal weights give equal bits."""
        with torch.no_grad():
            # Adapters are saved in this dtype: round them first.
            for name, parameter in self.vlm.named_parameters():
                if is_adapter(name):
                    parameter.copy_(parameter.to(adapter_dtype(self.config)))
        batch = self.data.collate.batch(sorted(self.examples, key=lambda e: len(e.encoded.input_ids))[:2])
        try:
            save_model(folder, self.config, self.vlm, llm)
            expected, found = _logits(self.vlm, batch), _logits(load_model(folder)[0], batch)
        except UsageError as error:
            raise _failed("saving", f"the saved model cannot be loaded: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        difference = float((expected - found).abs().max())
        largest = float(expected.abs().max())
        # Kernels may round differently if memory is aligned differently; wrong weights differ by more.
        if not difference <= largest * math.sqrt(torch.finfo(expected.dtype).eps):
            raise _failed("saving", f"logits of up to {largest:.3g} differ by {difference:.3g} once loaded")
        log.info("Preflight: logits differ by %.3g after saving and loading", difference)

    @torch.no_grad()
    def _losses(self, batches: Sequence[Batch]) -> list[float]:
        """The summed loss of each batch, without dropout."""
        self.vlm.eval()
        with self._precision():
            return [float(self.vlm(batch.to(self.device)).total) for batch in batches]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.trainer.precision == "bf16-mixed")


@torch.no_grad()
def _logits(vlm: VLM, batch: Batch) -> Tensor:
    """float[B, L, V], without dropout."""
    vlm.eval()
    return vlm.logits(vlm.hidden_states(batch))
