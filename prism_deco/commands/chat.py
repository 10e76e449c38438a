"""`prism-deco chat`: a conversation about images in the terminal."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prism_deco.commands.common import PLUGINS, count, import_plugins_only
from prism_deco.errors import UsageError
from prism_deco.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from prism_deco.api import Model
    from prism_deco.llms import Message

HELP = "/image PATH [PATH ...] shows other images, /reset forgets the conversation, /quit leaves."


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, or an export of one")
    parser.add_argument("settings", nargs="*", metavar="plugins=[MODULE]", help=PLUGINS)
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="the image to talk about; repeat it for several"
    )
    parser.add_argument("--max-new-tokens", type=count, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--relevance", action="store_true", help="show where each answer looked (its question alone)")
    parser.add_argument("--out", type=Path, help="folder for the pictures of --relevance (default: RUN/chat)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type to compute in (default: the run's)")
    parser.add_argument("--device", default="cpu", help="cpu | cuda (default: %(default)s)")


def chat(args: argparse.Namespace) -> None:
    """Talk with a trained model about images. Without --image, /image PATH shows one."""
    import torch

    from prism_deco.api import load
    from prism_deco.data.images import open_image

    import_plugins_only(args.settings)
    if args.relevance and len(args.image) > 1:
        raise UsageError(f"--relevance explains answers about one image, not {len(args.image)}.")
    for path in args.image:
        open_image(path)  # fail before the model is loaded
    relevance = (args.out or args.run / "chat") if args.relevance else None
    if relevance is not None:
        check_writable(relevance, "Name a folder for the pictures with --out.")
    model = load(args.run, device=args.device, dtype=getattr(torch, args.dtype) if args.dtype else None)
    talk = Chat(model, max_new_tokens=args.max_new_tokens, relevance=relevance, name=args.run.name)
    if args.image:
        talk.show(args.image)
    # No prompt for input from a pipe, which would only clutter the output.
    converse(talk, lambda: input("> " if sys.stdin.isatty() else ""))


class Chat:
    """The state of a conversation: the images and the messages.

    Args:
        relevance: folder for a relevance overlay of every answer about a single image; the numbers continue those in
            the folder. None makes no overlays.
        name: the model's name on the overlay's page.
    """

    def __init__(
        self, model: Model, *, max_new_tokens: int = 256, relevance: Path | None = None, name: str = "model"
    ) -> None:
        self.model = model
        self.messages: list[Message] = []
        self._max_new_tokens = max_new_tokens
        self._relevance = relevance
        self._name = name
        self._images: list[Path] = []
        self._visual: list[Tensor] = []
        self._answers = _last_answer(relevance) if relevance else 0

    def show(self, paths: Sequence[Path]) -> None:
        """Shows other images and starts a new conversation. `UsageError` if one cannot be read."""
        self._visual = self.model.encode_images(paths)
        self._images = list(paths)
        self.messages = []

    def ask(self, question: str) -> str:
        """Prints the answer while it is generated, adds it to the conversation, and returns it. `UsageError` if the
        conversation exceeds the LLM's positions."""
        from transformers import TextStreamer

        from prism_deco.inference import reply

        model = self.model
        asked: Message = {"role": "user", "content": question}
        # With turn_mask=block, a round saw only the image and itself in training.
        history = self.messages if model.vlm.turn_mask == "causal" else []
        answer = reply(
            model.vlm,
            model.llm,
            self._visual,
            [*history, asked],
            max_new_tokens=self._max_new_tokens,
            streamer=TextStreamer(model.llm.tokenizer, skip_special_tokens=True),  # type: ignore[arg-type]
        )
        # Only after the answer: a question that was refused leaves the conversation as it was.
        self.messages = [*self.messages, asked, {"role": "assistant", "content": answer}]
        self._answers += 1
        if self._relevance and len(self._images) == 1 and answer:
            self._explain(self._relevance / f"answer_{self._answers:02d}", question, answer)
        return answer

    def _explain(self, folder: Path, question: str, answer: str) -> None:
        from prism_deco.explain import ExplainExample, explain_image
        from prism_deco.explain.gae import DEFAULT_METHOD

        example = ExplainExample(self._images[0], question, answer)
        explain_image(self.model.vlm, self.model.llm, example, folder, run=self._name)
        _say(f"[{folder / DEFAULT_METHOD / 'sentence.png'}]")

    def obey(self, line: str) -> None:
        """Runs a line that starts with `/` as a command, and asks any other."""
        command, _, argument = line.partition(" ")
        if command == "/image":
            names = _file_names(argument)
            self.show([Path(name).expanduser() for name in names])
            _say(f"Now looking at {' and '.join(names)}.")
        elif line == "/reset":
            self.messages = []
            _say("The conversation is forgotten.")
        elif line.startswith("/"):
            _say(f"Unknown command {command}. {HELP}")
        elif line:
            self.ask(line)


def converse(talk: Chat, read: Callable[[], str]) -> None:
    """Reads lines and answers them until `/quit`, the end of the input, or Ctrl-C.

    Args:
        read: returns the next line; raises `EOFError` at the end.
    """
    _say(HELP)
    while True:
        try:
            line = read().strip()
            if line == "/quit":
                return
            talk.obey(line)
        except (EOFError, KeyboardInterrupt):
            _say("")
            return
        except (UsageError, OSError) as error:  # OSError: the relevance cannot be written
            _say(str(error))


def _last_answer(folder: Path) -> int:
    """The highest number of an answer in a folder, which the next conversation continues; 0 if there is none."""
    numbers = [path.name.removeprefix("answer_") for path in folder.glob("answer_*")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _file_names(argument: str) -> list[str]:
    """The paths of a command, quoted as in a shell. An argument that exists as a whole is one path, spaces included."""
    if Path(argument.strip()).expanduser().exists():
        return [argument.strip()]
    try:
        return shlex.split(argument)
    except ValueError as error:  # an unclosed quote
        raise UsageError(f"/image {argument}: {error}.") from error
