"""A conversation about images in the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import TextStreamer

from prism_deco.api import Model
from prism_deco.errors import UsageError
from prism_deco.explain import ExplainExample, explain_image
from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.inference import reply
from prism_deco.llms import Message

HELP = "/image PATH [PATH ...] shows other images, /reset forgets the conversation, /quit leaves."


class Chat:
    """The state of a conversation: the images, and what was said.

    Args:
        write: is handed the answers piece by piece as they are generated, and messages.
        relevance: folder for a relevance overlay of every answer about a single image; None makes none.
        name: the model's name on the overlay's page.
    """

    def __init__(
        self,
        model: Model,
        write: Callable[[str], object],
        *,
        max_new_tokens: int = 256,
        relevance: Path | None = None,
        name: str = "model",
    ):
        self.model = model
        self.messages: list[Message] = []
        self._write = write
        self._max_new_tokens = max_new_tokens
        self._relevance = relevance
        self._name = name
        self._images: list[Path] = []
        self._visual: list[Tensor] = []
        self._answers = 0

    def show(self, paths: Sequence[Path]) -> None:
        """Other images; the conversation begins anew. `OSError` if one cannot be read."""
        self._visual = self.model.encode_images(paths)
        self._images = list(paths)
        self.messages = []

    def reset(self) -> None:
        """Forgets what was said; the images stay."""
        self.messages = []

    def ask(self, question: str) -> str:
        """Streams the answer, and adds both to the conversation; returns the answer.

        Raises:
            UsageError: the conversation fills the LLM's positions.
        """
        model = self.model
        asked: Message = {"role": "user", "content": question}
        # Trained with turn_mask=block, a round has seen the image and itself only.
        history = self.messages if model.vlm.turn_mask == "causal" else []
        answer = reply(
            model.vlm,
            model.llm,
            self._visual,
            [*history, asked],
            max_new_tokens=self._max_new_tokens,
            streamer=_Streamer(model, self._write),
        )
        self.messages = [*self.messages, asked, {"role": "assistant", "content": answer}]
        self._answers += 1
        if self._relevance and len(self._images) == 1 and answer:
            self._explain(self._relevance / f"answer_{self._answers:02d}", question, answer)
        return answer

    def _explain(self, folder: Path, question: str, answer: str) -> None:
        example = ExplainExample(self._images[0], question, answer)
        explain_image(self.model.vlm, self.model.llm, example, folder, run=self._name)
        self._write(f"[{folder / DEFAULT_METHOD / 'sentence.png'}]\n")


def converse(chat: Chat, read: Callable[[], str], write: Callable[[str], object]) -> None:
    """Reads lines and answers them until `/quit`, the end of the input, or Ctrl-C.

    Args:
        read: the next line; `EOFError` at the end.
    """
    write(f"{HELP}\n")
    while True:
        try:
            line = read().strip()
            if line == "/quit":
                return
            _obey(chat, line, write)
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        except (UsageError, OSError) as error:
            write(f"{error}\n")


def read_line() -> str:
    """The next line of the terminal (with a prompt) or of a pipe (without)."""
    return input("> " if sys.stdin.isatty() else "")


def _obey(chat: Chat, line: str, write: Callable[[str], object]) -> None:
    command, _, argument = line.partition(" ")
    if command == "/image":
        names = _file_names(argument)
        chat.show([Path(name).expanduser() for name in names])
        write(f"Now looking at {' and '.join(names)}.\n")
    elif line == "/reset":
        chat.reset()
        write("The conversation is forgotten.\n")
    elif line.startswith("/"):
        write(f"Unknown command {command}. {HELP}\n")
    elif line:
        chat.ask(line)


def _file_names(argument: str) -> list[str]:
    """The paths of a command. A path may have spaces: one that exists as it stands is a single one; several take quotes
    as in a shell."""
    if Path(argument.strip()).expanduser().exists():
        return [argument.strip()]
    try:
        return shlex.split(argument)
    except ValueError as error:  # a quote that is not closed
        raise UsageError(f"/image {argument}: {error}.") from error


class _Streamer(TextStreamer):
    """Hands text on as soon as its last token is certain."""

    def __init__(self, model: Model, write: Callable[[str], object]):
        super().__init__(model.llm.tokenizer, skip_special_tokens=True)
        self._to = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._to(text + "\n" * stream_end)
