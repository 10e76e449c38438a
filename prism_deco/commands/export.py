"""`prism-deco export`: a model in one folder, for use elsewhere."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from prism_deco.commands.common import Subparsers

log = logging.getLogger(__name__)


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `export`."""
    parser = subparsers.add_parser("export", parents=[common], help="write a model to one folder for use elsewhere")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, required=True, help="new folder to write")
    parser.add_argument("--merge", action="store_true", help="merge LoRA adapters into the LLM (an export always does)")
    parser.add_argument("--checkpoint", metavar="NAME", help="the model of this checkpoint of the run, step_NNNNNN")
    parser.add_argument("--hf", action="store_true", help="for plain transformers, as LlavaForConditionalGeneration")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type of the weights; the run's by default")
    parser.set_defaults(command=export)


def export(args: argparse.Namespace) -> None:
    """Writes a model to one folder for use elsewhere."""
    import torch

    from prism_deco.api import load
    from prism_deco.export import check_empty, save_llava
    from prism_deco.training.consolidate import consolidate

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.checkpoint:
        if args.hf or args.dtype:
            raise ValueError("--checkpoint writes a model folder as a run does: export that one with --hf or --dtype.")
        check_empty(args.to)
        consolidate(args.run, args.checkpoint, args.to)
    elif args.hf:
        # The two models are compared in the precision of training.
        model = load(args.run)
        save_llava(args.to, model.config, model.vlm, model.llm, dtype=dtype)
    else:
        load(args.run, dtype=dtype).save(args.to)
    log.info("The export is in %s", args.to)
