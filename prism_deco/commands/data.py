"""`prism-deco data check` and `data prepare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from prism_deco.commands.common import Subparsers, show
from prism_deco.config import load_config


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `data`."""
    data = subparsers.add_parser("data", help="check and fetch training data")
    data_commands = data.add_subparsers(required=True, metavar="WHAT")

    check = data_commands.add_parser("check", parents=[common], help="walk a data set and report every fault")
    check.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: data=llava data.json=FILE ...")
    check.add_argument("--out", type=Path, help="folder for bad.jsonl and report.json (runs/data_check/NAME)")
    check.add_argument("--workers", type=int, default=2, help="processes")
    check.add_argument("--allow", nargs="+", default=[], metavar="KIND", help="kinds of faults to put up with")
    check.set_defaults(command=data_check)

    prepare = data_commands.add_parser("prepare", parents=[common], help="download and lay out a published data set")
    prepare.add_argument("name", help="a choice of conf/data, for example llava_v1_5_mix665k")
    prepare.add_argument("--root", type=Path, required=True, help="folder to lay it out in")
    prepare.add_argument("--plan", action="store_true", help="only say what is missing and how large it is")
    prepare.set_defaults(command=data_prepare)


def data_check(args: argparse.Namespace) -> int:
    """Walks a data set; 1 where there are faults."""
    config = load_config(args.arguments)
    from prism_deco.build import group, max_positions, prompt_options
    from prism_deco.data import build_source
    from prism_deco.data.check import check
    from prism_deco.data.examples import Encoder
    from prism_deco.llms import build_llm

    llm = build_llm(group(config, "llm"), pretrained=False, device="meta", **prompt_options(config))
    encoder = Encoder(
        llm,
        max_text_tokens=config.recipe.max_text_tokens,
        max_positions=max_positions(config, llm),
        tokens_per_image=config.projector.num_tokens or config.recipe.num_tokens,
    )
    out = args.out or Path(config.runs_dir) / "data_check" / config.data.name
    report = check(build_source(group(config, "data")), encoder, out, workers=args.workers, allow=args.allow)
    show(report.render())
    return report.exit_status


def data_prepare(args: argparse.Namespace) -> None:
    """Downloads and lays out a published data set."""
    from prism_deco.data.prepare import plan, prepare, read_dataset

    dataset = read_dataset(args.name)
    show(plan(dataset, args.root).render())
    if not args.plan:
        prepare(dataset, args.root)
