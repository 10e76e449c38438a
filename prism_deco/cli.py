"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from prism_deco import commands

log = logging.getLogger("prism_deco")

OVERRIDES = "choices and settings, for example: projector=linear recipe.epochs=2 seed=3"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 1 faults found, 2 wrong input, 130 interrupted)."""
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
    train.set_defaults(command=commands.train)

    evaluate = subparsers.add_parser("evaluate", parents=[common], help="score a finished run, or a predictions file")
    evaluate.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    # argparse cannot tell an optional run folder from the first option; the equals sign can.
    evaluate.add_argument(
        "arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folder; benchmark=NAMES split=S limit=N batch_size=N"
    )
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
