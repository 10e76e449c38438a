"""`prism-deco probe`: what can be read from a run's visual tokens without its LLM."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prism_deco.commands.common import PLUGINS, count, import_plugins_only, own_benchmarks, show
from prism_deco.commands.scoring import finished_run
from prism_deco.errors import UsageError
from prism_deco.files import check_writable, write_json

if TYPE_CHECKING:  # labelled images need torch
    from prism_deco.explain.objects import LabelledImage

log = logging.getLogger(__name__)


def probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, or with --objects or --images an export of one")
    parser.add_argument("settings", nargs="*", metavar="plugins=[MODULE]", help=PLUGINS)
    parser.add_argument(
        "--objects",
        type=Path,
        metavar="FILE",
        help="images with labelled objects, in the format of COCO's instances (default: those of the run's miniature "
        "world); the last quarter is for testing",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="image folder; without --objects, all images in it")
    parser.add_argument("--limit", type=count, default=2000, help="most images to use (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for probe.json (default: RUN/probe)")
    parser.add_argument("--device", default="cpu", help="cpu | cuda (default: %(default)s)")


def probe(args: argparse.Namespace) -> None:
    """Read colours, shapes, digits, positions and the patches' features from the visual tokens, without the LLM."""
    import_plugins_only(args.settings)
    out = args.out or args.run / "probe"
    check_writable(out, "Name a folder for the results with --out.")
    images = _images(args)
    from prism_deco.api import load
    from prism_deco.explain.probe import probe as measure
    from prism_deco.explain.probe import probe_table

    model = load(args.run, device=args.device)
    # The last quarter, at least one image, is for testing.
    test = max(len(images) // 4, 1)
    found = {
        "run": args.run.name,
        "projector": model.config.projector.name,
        "images": {"fit": len(images) - test, "test": test},
        **measure(model.vlm, images[:-test], images[-test:]),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", found)
    show(probe_table(found))


def _images(args: argparse.Namespace) -> list[LabelledImage]:
    from prism_deco.data.images import FORMATS
    from prism_deco.explain.objects import LabelledImage, read_objects

    if args.objects is not None:
        return read_objects(args.objects, args.images or args.objects.parent, args.limit)
    if args.images is not None:
        endings = {f".{name.lower()}" for name in (*FORMATS, "jpg", "tif")}
        files = [path for path in sorted(args.images.rglob("*")) if path.suffix.lower() in endings]
        if not files:
            raise UsageError(f"There is no image in {args.images}.")
        return [LabelledImage(path) for path in files[: args.limit]]
    finished_run(args.run)
    world = own_benchmarks(args.run)
    if world is None or not (world / "train-objects.json").is_file():
        raise UsageError(
            f"{args.run} has no miniature world, or it was removed: name images with labelled objects (--objects FILE "
            "--images DIR), or images alone (--images DIR)."
        )
    return read_objects(world / "train-objects.json", world / "images", args.limit)
