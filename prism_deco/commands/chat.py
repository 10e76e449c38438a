"""`prism-deco chat`: a conversation about images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prism_deco.commands.common import Subparsers
from prism_deco.errors import UsageError


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `chat`."""
    parser = subparsers.add_parser("chat", parents=[common], help="talk with a trained model about images")
    parser.add_argument("run", type=Path, help="run folder, or an export of one")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="the image to talk about; repeat it for several"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--relevance", action="store_true", help="show where each answer looked (its question alone)")
    parser.add_argument("--out", type=Path, help="folder for what --relevance draws (RUN/chat)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.set_defaults(command=chat)


def chat(args: argparse.Namespace) -> None:
    """A conversation about images."""
    import torch

    from prism_deco.api import load
    from prism_deco.chat import Chat, converse, read_line
    from prism_deco.evaluation.ranks import asked_device

    if args.relevance and len(args.image) > 1:
        raise UsageError(f"--relevance explains answers about one image, not {len(args.image)}.")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    model = load(args.run, device=asked_device(args.device), dtype=getattr(torch, args.dtype) if args.dtype else None)
    relevance = (args.out or args.run / "chat") if args.relevance else None
    talk = Chat(model, write, max_new_tokens=args.max_new_tokens, relevance=relevance, name=args.run.name)
    if args.image:
        talk.show(args.image)
    converse(talk, read_line, write)
