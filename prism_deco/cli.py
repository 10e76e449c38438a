"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from prism_deco import commands
from prism_deco.bench.presets import PRESETS

log = logging.getLogger("prism_deco")

OVERRIDES = "choices and settings, for example: projector=linear recipe.epochs=2 seed=3"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 1 faults found or a failed run, 2 wrong input, 75 preempted,
    76 out of memory, 130 interrupted)."""
    args = _parse(argv)
    _configure_logging(debug=args.debug)
    try:
        return args.command(args) or 0
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        sys.stderr.write(f"prism-deco: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("prism-deco: interrupted\n")
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes the key=value arguments in one piece only; people put options between them.
    if rest and (not hasattr(args, "arguments") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.arguments += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prism-deco", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    train = subparsers.add_parser("train", parents=[common], help="compose and train a model, then score it")
    train.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    train.add_argument("--overwrite", action="store_true", help="replace the run folder if it exists")
    train.add_argument("--force", action="store_true", help="train even what does not fit the memory by its plan")
    train.set_defaults(command=commands.train)

    evaluate = subparsers.add_parser("evaluate", parents=[common], help="score a finished run, or a predictions file")
    evaluate.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    # argparse cannot tell an optional run folder from the first option; the equals sign can.
    evaluate.add_argument(
        "arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folder; benchmark=NAMES split=S limit=N batch_size=N"
    )
    evaluate.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    evaluate.add_argument("--device", help="cpu | cuda; what the run was trained on by default")
    evaluate.set_defaults(command=commands.evaluate)

    explain = subparsers.add_parser("explain", parents=[common], help="show where each generated word looked (R-GAE)")
    explain.add_argument("arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folders; benchmark=NAME limit=N")
    explain.add_argument("--image", type=Path, help="explain an answer about this image")
    explain.add_argument("--prompt", help="the question about it")
    explain.add_argument("--answer", help="the text to explain; the model's own answer by default")
    explain.add_argument("--out", type=Path, help="folder for pictures, numbers and pages (RUN/explain)")
    explain.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    explain.add_argument("--device", default="cpu", help="cpu | cuda")
    explain.add_argument("--chunk", type=int, help="answer tokens per backward pass; what memory allows by default")
    explain.add_argument("--through-backbone", action="store_true", help="continue to the pixels' patches")
    explain.set_defaults(command=commands.explain)

    chat = subparsers.add_parser("chat", parents=[common], help="talk with a trained model about an image")
    chat.add_argument("run", type=Path, help="run folder, or an export of one")
    chat.add_argument("--image", type=Path, help="the image to talk about")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    chat.add_argument("--relevance", action="store_true", help="show where each answer looked (its question alone)")
    chat.add_argument("--out", type=Path, help="folder for what --relevance draws (RUN/chat)")
    chat.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    chat.add_argument("--device", default="cpu", help="cpu | cuda")
    chat.set_defaults(command=commands.chat)

    export = subparsers.add_parser("export", parents=[common], help="write a model to one folder for use elsewhere")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("--to", type=Path, required=True, help="new folder to write")
    export.add_argument("--merge", action="store_true", help="merge LoRA adapters into the LLM (an export always does)")
    export.add_argument("--checkpoint", metavar="NAME", help="the model of this checkpoint of the run, step_NNNNNN")
    export.add_argument("--hf", action="store_true", help="for plain transformers, as LlavaForConditionalGeneration")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], help="type of the weights; the run's by default")
    export.set_defaults(command=commands.export)

    sweep = subparsers.add_parser("sweep", parents=[common], help="train a grid of models and keep its ledger")
    sweep.add_argument(
        "arguments",
        nargs="*",
        metavar="NAME KEY=VALUE[,VALUE]",
        help="a choice of conf/sweep or a YAML of your own; settings of train, several values make an axis; "
        "name=NAME runs_dir=DIR launcher=local|slurm slurm.partition=P slurm.time=MINUTES ...",
    )
    sweep.add_argument("--jobs", type=int, metavar="N", help="cells at a time")
    sweep.add_argument("--timeout", type=float, default=60.0, metavar="MINUTES", help="silence of a hung cell (0: off)")
    sweep.add_argument("--dry-run", action="store_true", help="print the command lines, or the SLURM jobs")
    sweep.add_argument("--status", action="store_true", help="print the ledger")
    sweep.set_defaults(command=commands.sweep)

    plan = subparsers.add_parser("plan", parents=[common], help="what a run or a sweep will take: memory, time, disk")
    plan.add_argument("arguments", nargs="*", metavar="NAME KEY=VALUE[,VALUE]", help="as for sweep, or for train")
    plan.add_argument("--accelerator", metavar="NAME", help="a100 | h100 | h200 | l40s | ... (h100; none on the CPU)")
    plan.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="share of its peak that is reached (0.4)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    plan.set_defaults(command=commands.plan)

    data = subparsers.add_parser("data", help="check and fetch training data")
    data_commands = data.add_subparsers(required=True, metavar="WHAT")
    check = data_commands.add_parser("check", parents=[common], help="walk a data set and report every fault")
    check.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: data=llava data.json=FILE ...")
    check.add_argument("--out", type=Path, help="folder for bad.jsonl and report.json (runs/data_check/NAME)")
    check.add_argument("--workers", type=int, default=2, help="processes")
    check.add_argument("--allow", nargs="+", default=[], metavar="KIND", help="kinds of faults to put up with")
    check.set_defaults(command=commands.data_check)
    prepare = data_commands.add_parser("prepare", parents=[common], help="download and lay out a published data set")
    prepare.add_argument("name", help="a choice of conf/data, for example llava_v1_5_mix665k")
    prepare.add_argument("--root", type=Path, required=True, help="folder to lay it out in")
    prepare.add_argument("--plan", action="store_true", help="only say what is missing and how large it is")
    prepare.set_defaults(command=commands.data_prepare)

    report = subparsers.add_parser("report", parents=[common], help="tables, statistics and figures of a sweep or runs")
    report.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep's folder, or run folders")
    report.add_argument("--out", type=Path, help="folder to write to (FOLDER/report; beside the runs)")
    report.add_argument("--split", help="of the benchmarks: own | test | ...; their own by default")
    report.add_argument("--mixed", action="store_true", help="put cells into one table that saw different things")
    report.set_defaults(command=commands.report)

    blind = subparsers.add_parser("record-blind", parents=[common], help="keep a blind run's scores as the reference")
    blind.add_argument("run", type=Path, help="run folder, trained with recipe.blind=true and scored")
    blind.add_argument("--out", type=Path, help="reference file; the package's own by default")
    blind.set_defaults(command=commands.record_blind)

    pretrain = subparsers.add_parser(
        "pretrain-mini", parents=[common], help="remake the towers and tokenizers of the miniature"
    )
    pretrain.add_argument("names", nargs="*", help=f"{', '.join(commands.MINIATURE_PARTS)}; all by default")
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write to")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.set_defaults(command=commands.pretrain_mini)

    bench = subparsers.add_parser("bench", help="measure speed and memory")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    projectors = benches.add_parser("projectors", parents=[common], help="forward and backward of every projector")
    projectors.add_argument("names", nargs="*", help="projectors; all by default")
    projectors.add_argument("--in-dim", type=int, default=1024, help="channels of a patch feature")
    projectors.add_argument("--out-dim", type=int, default=4096, help="embedding size of the LLM")
    projectors.add_argument("--in-grid", type=int, nargs=2, default=(24, 24), metavar=("H", "W"), help="patch grid")
    projectors.add_argument("--num-tokens", type=int, default=144, help="visual tokens of compressing projectors")
    projectors.add_argument("--batch-size", type=int, default=8, help="images per pass")
    projectors.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    projectors.add_argument("--device", default="cpu", help="cpu | cuda")
    projectors.add_argument("--repeats", type=int, default=10, help="timed passes per projector")
    projectors.set_defaults(command=commands.bench_projectors)
    loading = benches.add_parser("data", parents=[common], help="images per second beside PIL and torchvision")
    loading.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: backbone=NAME llm=NAME")
    loading.set_defaults(command=commands.bench_data)
    steps = benches.add_parser("train", parents=[common], help="our training step beside transformers' own LLaVA")
    steps.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: backbone=NAME llm=NAME")
    steps.add_argument("--preset", choices=list(PRESETS), default="qwen_small", help="what the overrides build on")
    steps.add_argument("--batch-size", type=int, default=8, help="records per step")
    steps.add_argument("--steps", type=int, default=4, help="steps per round")
    steps.add_argument("--rounds", type=int, default=3, help="timed rounds, all ways alternating")
    steps.add_argument("--ablation", action="store_true", help="also what each of our means does alone")
    steps.add_argument("--device", default="cpu", help="cpu | cuda")
    steps.add_argument("--out", type=Path, metavar="FILE", help="write the numbers to this JSON file")
    steps.set_defaults(command=commands.bench_train)
    return parser


def _configure_logging(*, debug: bool) -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=debug)
    if not debug:
        # Lightning's hardware report and product tips, and deprecations between the libraries themselves.
        handler.addFilter(lambda record: record.name.startswith("prism_deco") or record.levelno >= logging.WARNING)
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%X", handlers=[handler])
    log.setLevel(logging.DEBUG if debug else logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
