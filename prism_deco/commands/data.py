"""`prism-deco data check` and `data prepare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from prism_deco.commands.common import OVERRIDES, count, show
from prism_deco.config import load_config
from prism_deco.files import check_writable


def data_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--out", type=Path, help="folder for bad.jsonl and report.json (default: runs/data_check/NAME)")
    parser.add_argument("--workers", type=count, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--allow", nargs="+", default=[], metavar="KIND", help="kinds of faults to tolerate")


def data_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a choice of conf/data")
    parser.add_argument("--root", type=Path, required=True, help="folder to lay it out in")
    parser.add_argument("--plan", action="store_true", help="only show what is missing and how large it is")


def data_check(args: argparse.Namespace) -> int:
    """Read every record and image of a data set and report the faults; the exit code is 1 if there are any."""
    config = load_config(args.arguments)
    from prism_deco.build import build_encoder, build_model, group
    from prism_deco.config.registry import import_plugins
    from prism_deco.data import build_source
    from prism_deco.data.check import check_dataset

    out = args.out or Path(config.runs_dir) / "data_check" / config.data.name
    check_writable(out, "Name a folder for the results with --out.")
    import_plugins(config.plugins)
    source = build_source(group(config, "data"))  # report a wrong path before a tokenizer is downloaded
    # Without weights: the encoder needs only the tokenizer and the number of visual tokens.
    vlm, llm = build_model(config, device="meta")
    encoder = build_encoder(config, llm, vlm.projector.num_tokens)
    report = check_dataset(source, encoder, out, workers=args.workers, allow=args.allow)
    show(report.render())
    return report.exit_status


def data_prepare(args: argparse.Namespace) -> None:
    """Download a published data set and lay it out for training. Existing files are kept."""
    from prism_deco.data.prepare import download_dataset, plan_download, read_dataset

    dataset = read_dataset(args.name)
    show(plan_download(dataset, args.root).render())
    if not args.plan:
        check_writable(args.root, "Name another folder with --root.")
        download_dataset(dataset, args.root)
