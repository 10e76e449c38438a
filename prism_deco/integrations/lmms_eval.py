"""A run as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, its simple model interface).

lmms-eval --model prism_deco --model_args run=runs/RUN_ID --tasks pope --batch_size 16
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prism_deco.api import load
from prism_deco.errors import UsageError

DTYPES = ("float32", "bfloat16")


class Request(NamedTuple):
    """The arguments of one of lmms-eval's requests."""

    context: str
    """The question, without a chat template."""
    more: Any
    """Settings of a generation; or the answer whose loss is requested, as a text or a function of the record."""
    to_images: Any
    """Function from a record to its images."""
    record: int
    task: str
    split: str


class PrismDeco(lmms):
    """Greedy answers of a run, and its losses of given answers.

    If lmms-eval runs in several processes, each loads the run and gets a share of the requests.

    Args:
        run: the run folder.
        batch_size: requests at a time.
        device: cpu | cuda; None uses the GPU if there is one.
        dtype: float32 | bfloat16; None is that of the weights.
        max_new_tokens: length limit of an answer, in tokens, if the task has none.
        plugins: modules to import first, separated by `+`; needed if the run was trained with plug-ins.
        max_batch_size: ignored; lmms-eval's command line passes it, for automatic batch sizes.
    """

    def __init__(
        self,
        run: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = 128,
        max_batch_size: int | None = None,
        plugins: str = "",
    ):
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype={dtype} is unknown: choose {' or '.join(DTYPES)}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(f"batch_size={batch_size}: give the number of requests to answer at a time.")
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.model = load(
            run,
            device=device or "auto",
            dtype=getattr(torch, dtype) if dtype else None,
            plugins=plugins.split("+") if plugins else (),
        )
        self.device = self.model.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.llm.tokenizer

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests, each cut before the first of its task's stop strings."""
        asked = [Request(*request.args) for request in requests]
        limits = [self._max_new_tokens(request) for request in asked]
        # Grouped by limit and longest first: there is little padding, and running out of memory shows at once.
        order = sorted(range(len(asked)), key=lambda i: (limits[i], len(asked[i].context)), reverse=True)
        answers = [""] * len(asked)
        for _, alike in groupby(order, key=lambda i: limits[i]):
            for batch in self._batches(list(alike)):
                images = self._images([asked[i] for i in batch])
                prompts = [asked[i].context for i in batch]
                texts = self.model.generate(images, prompts, max_new_tokens=limits[batch[0]])
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = _until(text, asked[i].more.get("until"))
                    self.cache_hook.add_partial("generate_until", (asked[i].context, asked[i].more), answers[i])
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Per request the mean loss of the answer's tokens in nats, and whether it is the greedy answer.

        A loss, not a likelihood: lmms-eval chooses the answer with the smallest value, since its own models return
        losses. (Version 0.7.3 converts the pairs of any model to text before it scores them, and then fails.)
        """
        asked = [Request(*request.args) for request in requests]
        scores: list[tuple[float, bool]] = []
        # The choices of a record are consecutive, so that a batch encodes its images once.
        for batch in self._batches(asked):
            # The chat template has its own delimiter before an answer, so the task's is stripped.
            answers = [self._answer(request).strip() for request in batch]
            contexts = [request.context for request in batch]
            losses, greedy = self.model.answer_losses(self._images(batch), contexts, answers)
            scores += zip(losses.tolist(), greedy.tolist(), strict=True)
        return scores

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported: choose tasks that ask once.")

    def _batches(self, values: Sequence[Any]) -> Iterator[Any]:
        starts = range(0, len(values), self.batch_size)
        for start in tqdm(starts, desc="prism_deco", disable=self.rank != 0 or not starts):
            yield values[start : start + self.batch_size]

    def _record(self, request: Request) -> Any:
        return self.task_dict[request.task][request.split][request.record]

    def _images(self, requests: Sequence[Request]) -> list[list[Tensor]]:
        """Visual tokens float[M, E] of each request's images; the images of a record are encoded once."""
        found: dict[tuple[str, str, int], list[Image.Image]] = {}
        for request in requests:
            key = (request.task, request.split, request.record)
            if key not in found:
                found[key] = list(request.to_images(self._record(request)) or [])
                if not all(isinstance(image, Image.Image) for image in found[key]):
                    raise UsageError(
                        f"{request.task}, record {request.record}: a run answers questions about images, not about "
                        f"videos or sounds (found {', '.join(type(item).__name__ for item in found[key])})."
                    )
        # All images in one call, in the order of `found`: each record takes as many results as it has images.
        encoded = iter(self.model.encode_images([image for images in found.values() for image in images]))
        tokens = {key: [next(encoded) for _ in images] for key, images in found.items()}
        return [tokens[request.task, request.split, request.record] for request in requests]

    def _answer(self, request: Request) -> str:
        return request.more if isinstance(request.more, str) else request.more(self._record(request))

    def _max_new_tokens(self, request: Request) -> int:
        settings = request.more
        if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams", 1) > 1:
            raise UsageError(
                f"{request.task} asks for sampling or beams, and a run answers greedily: add "
                "--gen_kwargs temperature=0,do_sample=False,num_beams=1 to compare it so."
            )
        return int(settings.get("max_new_tokens") or self.max_new_tokens)


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text
