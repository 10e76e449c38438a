"""`prism-deco export`: a model in one folder, for use elsewhere."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from prism_deco.commands.common import PLUGINS, import_plugins_only
from prism_deco.errors import UsageError
from prism_deco.files import check_folder, check_writable

log = logging.getLogger(__name__)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("settings", nargs="*", metavar="plugins=[MODULE]", help=PLUGINS)
    parser.add_argument("--to", type=Path, required=True, help="new folder to write")
    parser.add_argument("--merge", action="store_true", help="merge a run's LoRA adapters into the weights")
    parser.add_argument("--checkpoint", metavar="NAME", help="export a checkpoint of the run, step_NNNNNN")
    parser.add_argument(
        "--hf", action="store_true", help="for plain transformers; `hf upload NAME/MODEL TO` publishes it"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type of the weights (default: the run's)")


def export(args: argparse.Namespace) -> None:
    """Write a trained model to one folder, for use elsewhere or with plain transformers (--hf)."""
    import torch

    from prism_deco.api import load
    from prism_deco.export import check_empty, save_folder, save_transformers, whole_folder
    from prism_deco.training.consolidate import consolidate

    import_plugins_only(args.settings)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    check_writable(args.to, "Name another folder with --to.")
    # All checks come before the model is loaded.
    check_empty(args.to)
    check_folder(args.run)
    if args.checkpoint:
        if args.hf or args.dtype or args.merge:
            raise UsageError(
                "--checkpoint writes a model folder like a run's: export that folder with --merge, --hf or --dtype."
            )
        with whole_folder(args.to) as building:
            consolidate(args.run, args.checkpoint, building)
    else:
        _check_merge(args.run, args.merge)
        model = load(args.run)
        save = save_transformers if args.hf else save_folder
        save(args.to, model.config, model.vlm, model.llm, dtype=dtype, run=args.run)
    log.info("The export is in %s", args.to)


def _check_merge(run: Path, merges: bool) -> None:
    from prism_deco.training.model_folder import ADAPTERS, model_folder

    model = model_folder(run)
    adapted = any((model / name).is_dir() for name in ADAPTERS.values())
    if adapted and not merges:
        raise UsageError(
            f"{run} has LoRA adapters, and an export is a whole model: add --merge. To use the adapters and the "
            f"projector with their base model instead, take {model} as it is."
        )
    if merges and model.is_dir() and not adapted:
        raise UsageError(f"{run} has no LoRA adapters to merge: omit --merge.")
