"""Renders messages to segments of text by a chat template, which controls every token of a conversation.

A template is Jinja in the LLM's YAML, rendered by transformers. It writes every special token itself and puts
supervised text between `{% generation %}` and `{% endgeneration %}`. Besides `messages` and the special tokens by name,
it receives:

- `image`: marks where the visual tokens go (right after the BOS token); empty if they go elsewhere;
- `answer`: marks where an answer begins, in a template that also supervises text before it (its header);
- `tokenize`: "per_turn" or "whole", for templates whose spaces depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from prism_deco.config.registry import unknown
from prism_deco.config.schema import IMAGE_SLOT, TOKENIZE
from prism_deco.errors import UsageError
from prism_deco.exits import as_stop

IMAGE_TAG = "<image>"
"""Marks an image in a user's message, as in LLaVA's data."""

PLAIN_TEMPLATE = """\
{{- bos_token ~ image -}}
{%- for message in messages if message.role == 'assistant' -%}
  {%- generation -%}{{- message.content ~ '\n' -}}{%- endgeneration -%}
{%- endfor -%}"""
"""LLaVA's alignment prompt: the image and its caption, without the user's question."""

# Mark an image slot and the start of an answer in rendered text. Unicode reserves these noncharacters for internal use.
_SENTINEL = "\ufdd0"
_ANSWER = "\ufdd1"

Message = Mapping[str, str]


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation.

    Attributes:
        text: to be tokenised; empty for an image slot.
        supervised: whether the loss covers it (answers and their end tokens).
        image: whether it is the slot of one image's visual tokens.
        header: whether it is supervised text that precedes an answer and is part of its prompt.
        round: the question-and-answer round, from 1; 0 for the BOS token and an image slot right after it,
            which all rounds share. Text before the first question belongs to round 1.
    """

    text: str
    supervised: bool
    image: bool = False
    round: int = 0
    header: bool = False


@dataclass(frozen=True)
class PromptFormat:
    """A chat format.

    Special tokens spelled out in a message are tokenised as special tokens, as in PRISM and LLaVA.

    Args:
        template: Jinja source.
        special_tokens: `bos_token`, `eos_token`, `pad_token`, as templates name them.
        tokenize: passed to the template.
        image_slot: "after_bos" (PRISM: `<image>` is removed, messages are stripped), "after_first_token" (the same;
            slots come first, as the first token is known only after tokenisation), or "in_place" (LLaVA: `<image>`
            moves to the start of its message, followed by a newline).
    """

    template: str
    special_tokens: Mapping[str, str]
    tokenize: str
    image_slot: str

    def __post_init__(self):
        if self.image_slot not in IMAGE_SLOT:
            raise unknown("image_slot", self.image_slot, IMAGE_SLOT)
        if self.tokenize not in TOKENIZE:
            raise unknown("way to tokenize", self.tokenize, TOKENIZE)

    def render(self, messages: Sequence[Message], num_images: int = 0) -> list[Segment]:
        """The segments of a conversation that ends with an answer.

        Args:
            messages: `{"role": "user" | "assistant" | "system", "content": text}`: questions and answers
                alternate; a system message may come first.
            num_images: images of the conversation.

        Raises:
            UsageError: roles are out of order, there is no answer, images and `<image>` tags do not match, or the
                template cannot render the messages.
        """
        _check_roles(messages)
        image = _SENTINEL * num_images if self.image_slot == "after_bos" else ""
        variables: dict[str, Any] = dict(self.special_tokens)
        variables |= {"image": image, "answer": _ANSWER, "tokenize": self.tokenize}
        text, spans = self._marked(self._place(messages, num_images), variables)
        first = num_images if self.image_slot == "after_first_token" else 0
        segments = [Segment("", supervised=False, image=True)] * first
        segments += self._segments(text, spans)
        if sum(s.image for s in segments) != num_images:
            raise UsageError(f"The chat template must write {{{{ image }}}} once to place {num_images} images.")
        if not any(s.supervised for s in segments):
            raise UsageError("No text is supervised: put answers between {% generation %} and {% endgeneration %}.")
        return segments

    def _place(self, messages: Sequence[Message], num_images: int) -> list[dict[str, str]]:
        if self.image_slot == "in_place":
            return _tags_first(messages, num_images)
        # PRISM does this to answers as well.
        return [{"role": m["role"], "content": _neutral(m["content"]).replace(IMAGE_TAG, "").strip()} for m in messages]

    def _marked(
        self, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> tuple[str, Sequence[tuple[int, int]]]:
        """The text of a conversation, and the start and end of each supervised part."""
        (text,), (spans,) = self._render(messages, return_assistant_tokens_mask=True, **variables)
        return text, spans

    def _render(self, messages: Sequence[Message], **variables: Any) -> Any:
        try:
            return render_jinja_template([messages], chat_template=self.template, **variables)  # type: ignore[arg-type]
        except Exception as error:  # of any class: templates can run arbitrary expressions
            if as_stop(error):
                raise
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise UsageError(f"The chat template cannot render the conversation: {kind}{error}") from error

    def _segments(self, text: str, spans: Sequence[tuple[int, int]]) -> Iterator[Segment]:
        bos = self.special_tokens.get("bos_token", "")
        at = 0
        if bos and text.startswith(bos):
            # Separate, because SentencePiece tokenizers add their dummy prefix to the text that follows.
            yield Segment(bos, supervised=False)
            at = len(bos)
            while text.startswith(_SENTINEL, at):
                yield Segment("", supervised=False, image=True)
                at += len(_SENTINEL)
        for number, (start, end) in enumerate(spans, start=1):
            yield from _split_images(text[at:start], number)
            before, has_header, answer = text[start:end].rpartition(_ANSWER)
            if has_header:
                yield Segment(before, supervised=True, round=number, header=True)
            if answer:
                yield Segment(answer, supervised=True, round=number)
            at = end
        yield from _split_images(text[at:], len(spans))


class PlainFormat(PromptFormat):
    """LLaVA's alignment prompt (`PLAIN_TEMPLATE`): captions are not stripped, and there is no end token."""

    def _place(self, messages: Sequence[Message], num_images: int) -> list[dict[str, str]]:
        return [{"role": m["role"], "content": _neutral(m["content"]).replace(IMAGE_TAG, "")} for m in messages]


def ask_segments(ask: str, question: str, num_images: int, image_slot: str) -> list[Segment]:
    """The segments of a prompt that differs from training.

    Args:
        ask: text with `{question}`, and with `{image}` unless `image_slot` is after_first_token.
    """
    after_first = image_slot == "after_first_token"
    image = "" if after_first else _SENTINEL * num_images
    question = _neutral(question).replace(IMAGE_TAG, "").strip()
    try:
        text = ask.format(question=question, image=image)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"llm.asks: {ask!r} may have the fields {{question}} and {{image}} ({error!r}).") from error
    segments = [Segment("", supervised=False, image=True)] * (num_images if after_first else 0)
    segments += _split_images(text, 1)
    if sum(s.image for s in segments) != num_images:
        raise UsageError(f"llm.asks: {ask!r} must have {{image}} once to place {num_images} images.")
    return segments


def _check_roles(messages: Sequence[Message]) -> None:
    """`UsageError` unless the messages are [system,] user, assistant, user, assistant ..."""
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UsageError(f'A message is {{"role": ..., "content": text}}, not {message!r}.')
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise UsageError(f"A message holds half of a surrogate pair, which is not text: {message['content']!a}.")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise UsageError("The conversation is empty: it needs a user message and an answer.")
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise UsageError(
                f"Message {number + 1} of the conversation is from {role!r}, expected {expected!r}: user and assistant "
                "alternate, starting with the user (after an optional system message)."
            )
    if len(turns) % 2:
        raise UsageError("The conversation ends without an answer, so its last question would teach nothing.")


def _split_images(text: str, number: int) -> Iterator[Segment]:
    for index, part in enumerate(text.split(_SENTINEL)):
        if index:
            yield Segment("", supervised=False, image=True, round=number)
        if part:
            yield Segment(part, supervised=False, round=number)


def _tags_first(messages: Sequence[Message], num_images: int) -> list[dict[str, str]]:
    tags = [m["content"].count(IMAGE_TAG) if m["role"] == "user" else 0 for m in messages]
    if sum(tags) > num_images:
        # In LLaVA a message has at most one image, however many tags; without images, tags are plain text.
        tags = [min(count, 1, num_images) for count in tags]
    if not any(tags) and num_images:
        # Without tags, all images go to the first question.
        tags[[m["role"] for m in messages].index("user")] = num_images
    if sum(tags) != num_images:
        raise UsageError(
            f"The conversation has {sum(tags)} {IMAGE_TAG} tags and {num_images} images: one tag per image."
        )
    placed = []
    for message, count in zip(messages, tags, strict=True):
        text = _neutral(message["content"])
        if count:
            text = f"{_SENTINEL * count}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
        placed.append({"role": message["role"], "content": text})
    return placed


def _neutral(text: str) -> str:
    """The text with U+FFFD in place of the characters that mark image slots and answers."""
    return text.replace(_SENTINEL, "\ufffd").replace(_ANSWER, "\ufffd")
