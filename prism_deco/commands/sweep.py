"""`prism-deco sweep`, `plan` and `report`: grids of runs, before, while and after they are trained."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from prism_deco.commands.common import Subparsers, show
from prism_deco.config import load_config
from prism_deco.errors import UsageError

log = logging.getLogger(__name__)


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `sweep`, `plan` and `report`."""
    sweep_parser = subparsers.add_parser("sweep", parents=[common], help="train a grid of models and keep its ledger")
    sweep_parser.add_argument(
        "arguments",
        nargs="*",
        metavar="NAME KEY=VALUE[,VALUE]",
        help="a choice of conf/sweep or a YAML of your own; settings of train, several values make an axis; "
        "name=NAME runs_dir=DIR launcher=local|slurm slurm.partition=P slurm.time=MINUTES ...",
    )
    sweep_parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time")
    sweep_parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="MINUTES", help="silence of a hung cell (0: off)"
    )
    sweep_parser.add_argument("--dry-run", action="store_true", help="print the command lines, or the SLURM jobs")
    sweep_parser.add_argument("--status", action="store_true", help="print the ledger")
    sweep_parser.set_defaults(command=sweep)

    plan_parser = subparsers.add_parser(
        "plan", parents=[common], help="what a run or a sweep will take: memory, time, disk"
    )
    plan_parser.add_argument(
        "arguments", nargs="*", metavar="NAME KEY=VALUE[,VALUE]", help="as for sweep, or for train"
    )
    plan_parser.add_argument(
        "--accelerator", metavar="NAME", help="a100 | h100 | h200 | l40s | ... (h100; none on the CPU)"
    )
    plan_parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="share of its peak that is reached (0.4)"
    )
    plan_parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    plan_parser.set_defaults(command=plan)

    report_parser = subparsers.add_parser(
        "report", parents=[common], help="tables, statistics and figures of a sweep or runs"
    )
    report_parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep's folder, or run folders"
    )
    report_parser.add_argument("--out", type=Path, help="folder to write to (FOLDER/report; beside the runs)")
    report_parser.add_argument("--split", help="of the benchmarks: own | test | ...; their own by default")
    report_parser.add_argument(
        "--mixed", action="store_true", help="put cells into one table that saw different things"
    )
    report_parser.set_defaults(command=report)


def sweep(args: argparse.Namespace) -> int:
    """Runs the cells of a sweep that are not done; 1 where some still are not."""
    from rich.console import Console

    from prism_deco.sweep import Ledger, dry_run, parse, render, run

    if not args.timeout >= 0:
        raise UsageError(f"--timeout {args.timeout:g}: give minutes, or 0 for no limit.")
    spec = parse(args.arguments)
    if args.status:
        show(render(Ledger.read(spec.folder)))
        return 0
    if args.dry_run:
        sys.stdout.write(dry_run(spec, jobs=args.jobs))  # unwrapped: to be copied
        return 0
    console = Console()
    try:
        done = run(spec, jobs=args.jobs, timeout=args.timeout * 60 or None, console=console)
    finally:
        if not console.is_terminal and (spec.folder / "ledger.json").exists():
            show(render(Ledger.read(spec.folder)))
    log.info("The sweep is in %s; the same command goes on with what is not done", spec.folder)
    return 0 if done else 1


def plan(args: argparse.Namespace) -> None:
    """Says what the cells of a sweep, or one run, will take."""
    from prism_deco.plan import as_json, plan_run, table
    from prism_deco.stages import split
    from prism_deco.sweep import expand, parse
    from prism_deco.sweep.spec import split_values

    if args.json and not args.json.absolute().parent.is_dir():  # not after minutes of planning
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}.")
    if any("=" not in text or len(split_values(text.partition("=")[2])) > 1 for text in args.arguments):
        asked = [(cell.id, cell.overrides, cell.config) for cell in expand(parse(args.arguments))]
    else:
        asked = [("", args.arguments, None)]
    configs = {}
    for name, arguments, config in asked:
        stages = {f"{name} {stage.name}".strip(): stage.config for stage in split(arguments)}
        configs |= stages or {name: config or load_config(arguments)}
    plans = [
        plan_run(config, name, accelerator_name=args.accelerator, mfu=args.mfu) for name, config in configs.items()
    ]
    if args.json:
        args.json.write_text(json.dumps(as_json(plans), indent=2) + "\n", encoding="utf-8")
    show(table(plans, args.mfu))


def report(args: argparse.Namespace) -> None:
    """Writes the report of a sweep or of runs."""
    from prism_deco.report.assemble import write_report
    from prism_deco.report.tabular import terminal

    page, scores = write_report(args.folders, args.out, split=args.split, mixed=args.mixed)
    for table in scores:
        show(terminal(table))
    log.info("Open %s in a browser", page)
