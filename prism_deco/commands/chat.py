"""`prism-deco chat`: a conversation about images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prism_deco.commands.common import PLUGINS, import_plugins_only
from prism_deco.errors import UsageError


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chat`."""
    parser.add_argument("run", type=Path, help="run folder, or an export of one")
    parser.add_argument("settings", nargs="*", metavar="plugins=[MODULE]", help=PLUGINS)
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="the image to talk about; repeat it for several"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--relevance", action="store_true", help="show where each answer looked (its question alone)")
    parser.add_argument("--out", type=Path, help="folder for the pictures of --relevance (default: RUN/chat)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type to compute in (default: the run's)")
    parser.add_argument("--device", default="cpu", help="cpu | cuda (default: %(default)s)")


def chat(args: argparse.Namespace) -> None:
    """Talk with a trained model about images. Without --image, /image PATH shows one."""
    import torch

    from prism_deco.api import load
    from prism_deco.chat import Chat, converse, read_line
    from prism_deco.distributed import requested_device

    import_plugins_only(args.settings)

    if args.relevance and len(args.image) > 1:
        raise UsageError(f"--relevance explains answers about one image, not {len(args.image)}.")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    model = load(
        args.run, device=requested_device(args.device), dtype=getattr(torch, args.dtype) if args.dtype else None
    )
    relevance = (args.out or args.run / "chat") if args.relevance else None
    talk = Chat(model, write, max_new_tokens=args.max_new_tokens, relevance=relevance, name=args.run.name)
    if args.image:
        talk.show(args.image)
    converse(talk, read_line, write)
