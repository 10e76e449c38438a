"""A language model: a causal LM of transformers with its tokenizer and chat format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prism_deco.config.registry import unknown
from prism_deco.config.schema import AS_TRAINED, PROMPT
from prism_deco.errors import UsageError
from prism_deco.llms.encoding import Encoded, encode_segments, prompt_of
from prism_deco.llms.hub import load_tokenizer
from prism_deco.llms.own_template import OwnTemplate, own_template
from prism_deco.llms.prompts import PLAIN_TEMPLATE, Message, PlainFormat, PromptFormat, Segment, ask_segments
from prism_deco.llms.spec import LLMSpec, check_ask

_TRIAL = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}]


@dataclass
class LanguageModel:
    """A causal LM of transformers with its tokenizer and chat format.

    Attributes:
        model: the causal LM; its embedding tables fit the tokenizer.
        spec: the YAML keys it was built from.
    """

    model: PreTrainedModel = field(repr=False)
    spec: LLMSpec

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded on first use, so that planning a model needs no files.

        Raises:
            UsageError: it cannot be found, lacks a special token of the YAML, or has more tokens than the model has
                embeddings.
        """
        spec = self.spec
        tokenizer = load_tokenizer(spec)
        known = tokenizer.get_vocab()
        tokens: dict[str, Any] = dict(spec.special_tokens)
        if not spec.added_tokens and tokens["pad_token"] not in known:
            if tokenizer.unk_token is None:
                raise UsageError(
                    f"{spec.name}'s tokenizer has no unknown token to pad with: set recipe.added_tokens=true."
                )
            tokens["pad_token"] = tokenizer.unk_token
        for role, token in tokens.items():
            if token not in known and role != "pad_token":
                raise UsageError(f"The tokenizer of {spec.name} has no {role} {token!r}. Is it the right tokenizer?")
        tokenizer.add_special_tokens(tokens)
        tokenizer.chat_template = spec.chat_template or own_template(tokenizer, spec.name)
        rows = self.embedding_rows
        if len(tokenizer) > rows:
            raise UsageError(
                f"The tokenizer of {spec.name} has {len(tokenizer)} tokens, the model only {rows} embeddings: "
                f"set llm.tokenizer_size={len(tokenizer)}, or use the tokenizer that belongs to the weights."
            )
        return tokenizer

    @property
    def embed_dim(self) -> int:
        """Size E of the input embeddings."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).embedding_dim

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding table: at least the tokenizer's size."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]

    @property
    def max_positions(self) -> int:
        """Maximum sequence length in tokens; `UsageError` if the architecture does not define it."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is None:
            raise UsageError(
                f"The architecture of {self.spec.name} does not define a maximum sequence length: set "
                "llm.architecture.max_position_embeddings=N."
            )
        return int(positions)

    @property
    def stop_tokens(self) -> Sequence[str]:
        """The tokens that end an answer."""
        return self.spec.stop_tokens or [self.spec.special_tokens["eos_token"]]

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        known = self.tokenizer.get_vocab()
        for token in self.stop_tokens:
            if token not in known:
                raise UsageError(f"The tokenizer of {self.spec.name} has no token {token!r} (llm.stop_tokens).")
        return tuple(known[token] for token in self.stop_tokens)

    @cached_property
    def prompt_format(self) -> PromptFormat:
        """The format that `spec.prompt` names: "chat" (the LLM's template) or "plain" (LLaVA's alignment stage).

        Raises:
            UsageError: there is no such format, or it cannot render an image, a question and an answer.
        """
        spec = self.spec
        options = (spec.special_tokens, spec.tokenize, spec.image_slot)
        chosen: PromptFormat
        if spec.prompt not in PROMPT:
            raise unknown("recipe.prompt", spec.prompt, PROMPT)
        if spec.prompt == "plain":
            # No text precedes the image, so every image slot is the one after BOS.
            chosen = PlainFormat(PLAIN_TEMPLATE, spec.special_tokens, spec.tokenize, "after_bos")
        elif spec.chat_template:
            chosen = PromptFormat(spec.chat_template, *options)
        else:
            chosen = OwnTemplate(str(self.tokenizer.chat_template), *options, self.stop_tokens)
        chosen.render(_TRIAL, num_images=1)
        return chosen

    def render(self, messages: Sequence[Message], num_images: int = 0) -> list[Segment]:
        """The segments of a conversation; see `PromptFormat.render`."""
        return self.prompt_format.render(messages, num_images)

    def encode(self, messages: Sequence[Message], num_images: int = 0, add_generation_prompt: bool = False) -> Encoded:
        """The tokens of a conversation.

        With `add_generation_prompt` these are exactly the tokens before the answer in training, cut from a conversation
        with an answer. A prompt tokenised on its own may end in different tokens ("ASSISTANT: ").
        """
        if add_generation_prompt:
            placeholder = {"role": "assistant", "content": "A"}  # any answer that begins with a letter works
            return prompt_of(self.encode([*messages, placeholder], num_images))
        segments = self.render(messages, num_images)
        return encode_segments(segments, self.tokenizer, self.spec.tokenize, self.prompt_format.image_slot)

    def ask(self, question: str, num_images: int = 0, how: str = AS_TRAINED) -> Encoded:
        """The tokens of a question's prompt.

        Args:
            how: `AS_TRAINED`, or a key of the LLM's `asks`.
        """
        check_ask(self.spec, how)
        text = (self.spec.asks or {}).get(how)
        if text is None:
            return self.encode([{"role": "user", "content": question}], num_images, add_generation_prompt=True)
        slot = self.prompt_format.image_slot
        return encode_segments(ask_segments(text, question, num_images, slot), self.tokenizer, "whole", slot)
