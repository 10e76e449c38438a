"""Inference with a model: from questions and visual tokens to text, probabilities and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation.streamers import BaseStreamer

from prism_deco.config.schema import AS_TRAINED
from prism_deco.errors import UsageError
from prism_deco.llms import Encoded, LanguageModel, Message
from prism_deco.llms.encoding import IGNORE, answers_only
from prism_deco.sequence import Batch, build_batch
from prism_deco.vlm import VLM


@torch.no_grad()
def answer(
    vlm: VLM,
    llm: LanguageModel,
    visual: Sequence[Sequence[Tensor]],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    ask: str = AS_TRAINED,
) -> list[str]:
    """Greedy answers to a batch of questions.

    Args:
        visual: per question, the visual tokens float[M, E] of each of its images; empty for a text-only question.
        prompts: raw questions; the LLM's chat template is applied.
        ask: how to prompt, see `LanguageModel.ask`.
    """
    if not prompts:
        return []
    encoded = [llm.ask(p, len(v), ask) for p, v in zip(prompts, visual, strict=True)]
    return _generate(vlm, llm, visual, encoded, max_new_tokens=max_new_tokens)


@torch.no_grad()
def reply(
    vlm: VLM,
    llm: LanguageModel,
    visual: Sequence[Tensor],
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> str:
    """The greedy answer to the last message of a conversation.

    Args:
        visual: the visual tokens float[M, E] of each image of the conversation.
        messages: the whole conversation, as for `LanguageModel.encode`; the last message is the user's.
        streamer: receives the answer's tokens as they are generated.
    """
    encoded = llm.encode(messages, num_images=len(visual), add_generation_prompt=True)
    return _generate(vlm, llm, [visual], [encoded], max_new_tokens=max_new_tokens, streamer=streamer)[0]


def _generate(
    vlm: VLM,
    llm: LanguageModel,
    visual: Sequence[Sequence[Tensor]],
    encoded: Sequence[Encoded],
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    batch = _prompt_batch(vlm, llm, encoded)
    room = llm.max_positions - batch.input_ids.shape[1]
    if room < 1:
        raise UsageError(
            f"A prompt of {batch.input_ids.shape[1]} positions, image included, leaves no room for an answer in the "
            f"LLM's {llm.max_positions}: shorten it."
        )
    ids = vlm.generate(
        batch,
        _stack(visual, vlm),
        max_new_tokens=min(max_new_tokens, room),
        eos_ids=list(llm.eos_ids),
        pad_id=cast(int, llm.tokenizer.pad_token_id),
        streamer=streamer,
    )
    return [cast(str, llm.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ids]


@torch.no_grad()
def first_token_probabilities(
    vlm: VLM,
    llm: LanguageModel,
    visual: Sequence[Sequence[Tensor]],
    prompts: Sequence[str],
    choices: Sequence[str],
    *,
    ask: str = AS_TRAINED,
) -> Tensor:
    """float[questions, choices]: softmax over the choices at the first generated token.

    A choice's token id is taken from the conversation encoded with the choice as its answer, so that it has a leading
    space, or none, as in training. It does not depend on `ask`.

    Args:
        visual, prompts, ask: as for `answer`.
    """
    if not prompts:
        return torch.empty(0, len(choices))
    counts = [len(images) for images in visual]
    # int64[questions, choices].
    candidates = torch.tensor([_first_ids(llm, p, n, choices) for p, n in zip(prompts, counts, strict=True)])
    batch = _prompt_batch(vlm, llm, [llm.ask(p, n, ask) for p, n in zip(prompts, counts, strict=True)])
    # Left padding puts the last token of every prompt at the last position: [questions, E].
    hidden = vlm.hidden_states(batch, _stack(visual, vlm))[:, -1]
    logits = vlm.logits(hidden).float().gather(1, candidates.to(hidden.device))
    return logits.softmax(dim=1).cpu()


@torch.no_grad()
def answer_losses(
    vlm: VLM, llm: LanguageModel, visual: Sequence[Sequence[Tensor]], prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Losses of given answers, without the token that ends an answer.

    Args:
        visual, prompts: as for `answer`.
        answers: one text per question, not empty.

    Returns:
        float[questions], the mean cross-entropy of the answer's tokens in nats, and bool[questions], whether greedy
        decoding would begin with the answer.
    """
    if not prompts:
        return torch.empty(0), torch.empty(0, dtype=torch.bool)
    encoded = []
    for prompt, text, images in zip(prompts, answers, visual, strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        encoded.append(answers_only(llm.encode(messages, num_images=len(images))))
    batch = build_batch(encoded, vlm.projector.num_tokens).to(vlm.device)
    if batch.input_ids.shape[1] > llm.max_positions:
        raise UsageError(
            f"Question, answer and image take {batch.input_ids.shape[1]} positions, the LLM has {llm.max_positions}: "
            "shorten the text."
        )
    # Position p predicts the label at p + 1: from here on, labels[:, p] is what the hidden state at p predicts.
    labels = batch.labels[:, 1:]
    counted = torch.zeros_like(labels, dtype=torch.bool)
    for row, example in enumerate(encoded):
        # An answer's tokens are the first supervised ones; what `answer_ids` cuts off at the end is not counted.
        counted[row, (labels[row] != IGNORE).nonzero()[: len(answer_ids(llm, example)), 0]] = True
    # Only at counted positions, all questions in one row after another: [counted tokens, vocabulary].
    logits = vlm.logits(vlm.hidden_states(batch, _stack(visual, vlm))[:, :-1][counted]).float()
    by_token = F.cross_entropy(logits, labels[counted], reduction="none")
    lengths = counted.sum(dim=1).tolist()
    losses = torch.stack([part.mean() for part in by_token.split(lengths)])
    greedy = torch.stack([part.all() for part in (logits.argmax(dim=-1) == labels[counted]).split(lengths)])
    return losses.cpu(), greedy.cpu()


def answer_ids(llm: LanguageModel, encoded: Encoded) -> list[int]:
    """Token ids of a conversation's answer: the supervised ones (see `answers_only`), without the token that ends the
    answer and whitespace before it. `UsageError` if there are none."""
    ids = [label for label in encoded.labels if label != IGNORE]
    end = len(ids)
    while end and (ids[end - 1] in llm.eos_ids or not str(llm.tokenizer.decode([ids[end - 1]])).strip()):
        end -= 1
    if not end:
        raise UsageError("The answer is empty.")
    return ids[:end]


def _first_ids(llm: LanguageModel, prompt: str, images: int, choices: Sequence[str]) -> list[int]:
    # The conversation with an answer begins with the prompt's tokens; the answer's first token follows them.
    start = len(llm.ask(prompt, images).input_ids)
    ids = []
    for choice in choices:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": choice}]
        ids.append(llm.encode(messages, num_images=images).input_ids[start])
    if len(set(ids)) < len(choices):
        raise UsageError(f"The choices {', '.join(choices)} do not begin with different tokens of this tokenizer.")
    return ids


def _prompt_batch(vlm: VLM, llm: LanguageModel, encoded: Sequence[Encoded]) -> Batch:
    return build_batch(encoded, vlm.projector.num_tokens, left_pad=True).to(vlm.device)


def _stack(visual: Sequence[Sequence[Tensor]], vlm: VLM) -> Tensor | None:
    # In the order of the batch's visual positions: question by question, image by image.
    tokens = [image for images in visual for image in images]
    return torch.stack(tokens).to(vlm.device) if tokens else None
