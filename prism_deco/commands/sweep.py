"""`prism-deco sweep`, `plan` and `report`: grids of runs before, during and after training."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from prism_deco.commands.common import PLUGINS, count, import_plugins_only, show
from prism_deco.config import load_config
from prism_deco.errors import UsageError
from prism_deco.files import check_writable
from prism_deco.logs import log_console

if TYPE_CHECKING:
    from prism_deco.plan import RunEstimate

log = logging.getLogger(__name__)


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="NAME KEY=VALUE[,VALUE]",
        help="a choice of conf/sweep or a YAML of your own; settings of train, several values make an axis; "
        "name=NAME runs_dir=DIR launcher=local|slurm slurm.partition=P slurm.time=MINUTES ...",
    )
    parser.add_argument("--jobs", type=count, metavar="N", help="cells at a time (default: the sweep's own, or one)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="MINUTES",
        help="silence after which a cell counts as hung; 0 is off (default: %(default)g)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command lines, or the SLURM jobs")
    parser.add_argument("--status", action="store_true", help="print the ledger")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="NAME KEY=VALUE[,VALUE]", help="as for sweep, or for train")
    parser.add_argument(
        "--accelerator", metavar="NAME", help="a100 | h100 | h200 | l40s | ... (default: h100, none on a CPU)"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="achieved fraction of the peak FLOPs (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FOLDER plugins=[MODULE]",
        help=f"a sweep's folder, or run folders; plugins: {PLUGINS}",
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: FOLDER/report, or report next to runs)")
    parser.add_argument("--split", help="benchmark split to show: own | test | ... (default: own)")
    parser.add_argument("--mixed", action="store_true", help="compare cells that saw different data or steps")


def sweep(args: argparse.Namespace) -> int:
    """Train the cells of a sweep that are not done yet, each in a process of its own."""
    from rich.console import Console

    from prism_deco.sweep import Ledger, dry_run, parse, render, run

    # Not `< 0`, which nan would pass.
    if not args.timeout >= 0:
        raise UsageError(f"--timeout {args.timeout:g}: give minutes, or 0 for no limit.")
    spec = parse(args.arguments)
    if args.status:
        show(render(Ledger.read(spec.folder)))
        return 0
    if args.dry_run:
        sys.stdout.write(dry_run(spec, jobs=args.jobs))  # not wrapped, so that it can be copied
        return 0
    console = Console()
    try:
        done = run(spec, jobs=args.jobs, timeout=args.timeout * 60 or None, console=console)
    finally:
        # In a terminal, the live table stays on the screen.
        if not console.is_terminal and (spec.folder / "ledger.json").exists():
            show(render(Ledger.read(spec.folder)))
    log.info("The sweep is in %s; the same command continues cells that are not done", spec.folder)
    return 0 if done else 1


def plan(args: argparse.Namespace) -> None:
    """Estimate the memory, hours and disk of a run or of a sweep's cells, without weights, data or a GPU."""
    from prism_deco.stages import split
    from prism_deco.sweep import expand, parse
    from prism_deco.sweep.spec import is_sweep

    if args.json and not args.json.absolute().parent.is_dir():  # not after minutes of planning
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}.")
    if args.json:
        check_writable(args.json.parent, "Name another file with --json.")
    if is_sweep(args.arguments):
        asked = [(cell.id, cell.overrides, cell.config) for cell in expand(parse(args.arguments))]
    else:
        asked = [("", args.arguments, None)]
    configs = {}
    for name, arguments, config in asked:
        # A recipe with stages counts as one run per stage; without stages, `split` gives none.
        stages = {f"{name} {stage.name}".strip(): stage.config for stage in split(arguments)}
        configs |= stages or {name: config or load_config(arguments)}
    plans = _estimates(configs, args)
    from prism_deco.plan import PlanTable, as_json

    if args.json:
        args.json.write_text(json.dumps(as_json(plans), indent=2) + "\n", encoding="utf-8")
    show(PlanTable(plans, args.mfu))


def _estimates(configs: Mapping[str, DictConfig], args: argparse.Namespace) -> list[RunEstimate]:
    """Estimates each run, and shows the progress."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    console = log_console()
    columns = (TextColumn("Planning {task.description}", markup=False), MofNCompleteColumn())
    plans = []
    # Nearly all objects of the imports and of the plans stay: collections would traverse them without freeing much.
    gc.disable()
    try:
        from prism_deco.plan import estimate_run  # imports torch, so only after the arguments were checked

        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(configs))
            for name, config in configs.items():
                progress.update(task, description=name or "the run", refresh=True)
                if not console.is_terminal and len(configs) > 1:
                    log.info("Planning %s (%d of %d)", name, len(plans) + 1, len(configs))
                plans.append(estimate_run(config, name, accelerator_name=args.accelerator, mfu=args.mfu))
                progress.advance(task)
    finally:
        gc.enable()
    return plans


def report(args: argparse.Namespace) -> None:
    """Write the report of a sweep or of runs: one HTML page, Markdown, CSV files and figures."""
    from prism_deco.report.assemble import write_report
    from prism_deco.report.tabular import TerminalTable

    settings = [argument for argument in args.arguments if argument.startswith("plugins=")]
    import_plugins_only(settings)
    folders = [Path(argument) for argument in args.arguments if argument not in settings]
    page, scores = write_report(folders, args.out, split=args.split, mixed=args.mixed)
    for table in scores:
        show(TerminalTable(table))
    log.info("Open %s in a browser", page)
