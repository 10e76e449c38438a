"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from prism_deco.config import EvaluateConfig, load_config

log = logging.getLogger("prism_deco")

OVERRIDES = "choices and settings, for example: projector=linear recipe.epochs=2 seed=3"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 2 wrong input, 130 interrupted)."""
    args = _parser().parse_args(argv)
    _configure_logging(debug=args.debug)
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        sys.stderr.write(f"prism-deco: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("prism-deco: interrupted\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prism-deco", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", parents=[common], help="compose and train a model, then score it")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    train.add_argument("--overwrite", action="store_true", help="replace the run folder if it exists")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", parents=[common], help="score a finished run, or a predictions file")
    evaluate.add_argument("run", nargs="?", type=Path, help="run folder")
    evaluate.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="benchmark=NAMES limit=N batch_size=N")
    evaluate.set_defaults(command=_evaluate)

    pretrain = commands.add_parser("pretrain-mini", parents=[common], help="remake the miniature towers and tokenizers")
    pretrain.add_argument("names", nargs="*", help="towers to train, or `tokenizers`; all by default")
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write to")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.set_defaults(command=_pretrain_mini)

    bench = commands.add_parser("bench", help="measure speed and memory")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    projectors = benches.add_parser("projectors", parents=[common], help="forward and backward of every projector")
    projectors.set_defaults(command=_bench_projectors)
    return parser


def _train(args: argparse.Namespace) -> None:
    config = load_config(args.overrides)
    from prism_deco.training.run import prepare_run, set_status, train

    folder = train(config, prepare_run(config, overwrite=args.overwrite))
    if config.evaluate.benchmarks:
        _score(folder, config.evaluate)
    set_status(folder, "done")
    log.info("The run is in %s; watch it with: tensorboard --logdir %s", folder, config.runs_dir)


def _evaluate(args: argparse.Namespace) -> None:
    raise NotImplementedError


def _score(folder: Path, settings: EvaluateConfig) -> None:
    raise NotImplementedError


def _pretrain_mini(args: argparse.Namespace) -> None:
    raise NotImplementedError


def _bench_projectors(args: argparse.Namespace) -> None:
    raise NotImplementedError


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
