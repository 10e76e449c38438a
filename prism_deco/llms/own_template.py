"""Chat formats from a tokenizer's own template, whose answers are found without `{% generation %}` marks.

Each answer is put between two marker characters, so that one rendering shows where it begins and ends. A short
conversation, rendered once, shows how a prompt and its answer join, and what the template removes from the prompt once
the answer is history (an empty thinking block).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from prism_deco.errors import UsageError
from prism_deco.llms.prompts import PromptFormat

# Prepended to the tokenizer's own template. That writes the BOS token without an image; some enable thinking, and some
# write today's date, which would change a record's tokens from day to day: this is the fallback of Llama's template.
_PRELUDE = """\
{{- bos_token ~ image -}}
{%- set bos_token = '' -%}
{%- set enable_thinking = false -%}
{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}
"""
# Unicode reserves these noncharacters for internal use.
_BEGIN, _END = "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_SYSTEM = {"role": "system", "content": "Be brief."}
_TALK = [
    {"role": "user", "content": "Is it red?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It is."},
]
_HINT = "Set llm.chat_template to a template of your own with {% generation %} marks (prism_deco/llms/prompts.py)."


def own_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The tokenizer's own template, extended to write the BOS token and the image slot first."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UsageError(f"The tokenizer of {name} has no chat template: set llm.chat_template in its YAML.") from error
    return template if template.startswith(_PRELUDE) else _PRELUDE + template  # a saved tokenizer has it already


@dataclass(frozen=True)
class OwnTemplate(PromptFormat):
    """A chat format whose template comes with the tokenizer; `template` is from `own_template`.

    Answers are stripped, as many templates do. An answer and its end, a token of `stop_tokens`, are supervised. Some
    templates remove the end of a prompt once its answer is history, such as Qwen3's empty thinking block; it is kept
    before every answer, unsupervised, so that each answer is learned after the prompt that asks for it.
    """

    stop_tokens: Sequence[str]
    _surroundings: dict[bool, tuple[str, str, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _marked(
        self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        parts = self._parts(messages, variables)
        if parts[1::2] != [_bare(m["content"]) for m in messages if m["role"] == "assistant"]:
            raise UsageError(f"The tokenizer's chat template changes the text of an answer. {_HINT}")
        thoughts, space, gap = self._around_answers(messages[0]["role"] == "system")
        text = ""
        spans = []
        rest = parts[0]  # text after the last answer's end, with the space that belongs to the next answer
        for answer, after in zip(parts[1::2], parts[2::2], strict=True):
            is_last = len(spans) == len(parts) // 2 - 1
            text += rest.removesuffix(space) + ("" if is_last else thoughts)
            end = self._end(after if is_last else after[:gap])  # the next question may contain a stop token
            spans.append((len(text), len(text) + len(space + answer) + end))
            text += space + answer + after[:end]
            rest = after[end:]
        return text + rest, spans

    def _parts(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any], **options: Any) -> list[str]:
        """Text, answer, text, answer, ..., text of a rendered conversation."""
        marked = []
        for message in messages:
            content = _MARKS.sub("", message["content"])
            if message["role"] == "assistant":
                content = f"{_BEGIN}{_bare(content)}{_END}"
            marked.append({"role": message["role"], "content": content})
        text = self._render(marked, **variables, **options)[0][0]
        count = sum(message["role"] == "assistant" for message in messages)
        if "".join(_MARKS.findall(text)) != (_BEGIN + _END) * count:
            raise UsageError(f"The tokenizer's chat template does not write every answer once, in order. {_HINT}")
        return _MARKS.split(text)

    def _around_answers(self, system: bool) -> tuple[str, str, int]:
        """What the template adds around answers.

        Returns:
            The end of a prompt that the template removes once its answer is history, the whitespace it writes before an
            answer, and the length of what it writes between an answer and the text of the next question.

        Raises:
            UsageError: answers do not follow their prompts directly, later messages change earlier ones in other ways,
                or the text of a question is changed.
        """
        if system not in self._surroundings:
            talk = [_SYSTEM] * system + _TALK
            variables = dict(self.special_tokens) | {"image": "", "tokenize": self.tokenize}
            (prompt,) = self._parts(talk[:-3], variables, add_generation_prompt=True)
            old, _, second_prompt = self._parts(talk[:-1], variables, add_generation_prompt=True)
            new = self._parts(talk[:-2], variables)[0]
            both = self._parts(talk, variables)
            space = new.removeprefix(prompt)
            opening = old.removesuffix(space)
            is_stable = new.startswith(prompt) and not space.strip() and prompt.startswith(opening)
            if not is_stable or both[0] != old or both[2] != second_prompt + space:
                raise UsageError(
                    "The tokenizer's chat template does not write an answer right after the prompt that asks for it, "
                    "or changes earlier messages when others follow (thinking that cannot be switched off?). "
                    f"{_HINT}"
                )
            if prompt.startswith(2 * self.special_tokens["bos_token"]):
                raise UsageError(f"The tokenizer's chat template spells out the BOS token. {_HINT}")
            gap = both[2].find(talk[-2]["content"])
            if gap < 0:
                raise UsageError(f"The tokenizer's chat template changes the text of a question. {_HINT}")
            self._surroundings[system] = prompt.removeprefix(opening), space, gap
        return self._surroundings[system]

    def _end(self, after: str) -> int:
        """The length of what ends an answer, in the text after it."""
        ends = [after.find(token) + len(token) for token in self.stop_tokens if token in after]
        if not ends:
            raise UsageError(
                f"The tokenizer's chat template does not end answers with {' or '.join(self.stop_tokens)}: set "
                "llm.stop_tokens to the token that does."
            )
        return min(ends)


def _bare(answer: str) -> str:
    return _MARKS.sub("", answer).strip()
