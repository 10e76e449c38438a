"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prism_deco.config import load_config

log = logging.getLogger("prism_deco")

MINIATURE_PARTS = ("mini_clip", "mini_siglip", "mini_dinov2", "tokenizers")
TOKENIZER_TEXTS = 500
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", parents=[common], help="compose and train a model, then score it")
    train.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    train.add_argument("--overwrite", action="store_true", help="replace the run folder if it exists")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", parents=[common], help="score a finished run, or a predictions file")
    evaluate.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    # argparse cannot tell an optional run folder from the first option; the equals sign can.
    evaluate.add_argument(
        "arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folder; benchmark=NAMES split=S limit=N batch_size=N"
    )
    evaluate.set_defaults(command=_evaluate)

    data = commands.add_parser("data", help="check and fetch training data")
    data_commands = data.add_subparsers(required=True, metavar="WHAT")
    check = data_commands.add_parser("check", parents=[common], help="walk a data set and report every fault")
    check.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: data=llava data.json=FILE ...")
    check.add_argument("--out", type=Path, help="folder for bad.jsonl and report.json (runs/data_check/NAME)")
    check.add_argument("--workers", type=int, default=2, help="processes")
    check.add_argument("--allow", nargs="+", default=[], metavar="KIND", help="kinds of faults to put up with")
    check.set_defaults(command=_data_check)
    prepare = data_commands.add_parser("prepare", parents=[common], help="download and lay out a published data set")
    prepare.add_argument("name", help="a choice of conf/data, for example llava_v1_5_mix665k")
    prepare.add_argument("--root", type=Path, required=True, help="folder to lay it out in")
    prepare.add_argument("--plan", action="store_true", help="only say what is missing and how large it is")
    prepare.set_defaults(command=_data_prepare)

    blind = commands.add_parser("record-blind", parents=[common], help="keep a blind run's scores as the reference")
    blind.add_argument("run", type=Path, help="run folder, trained with recipe.blind=true and scored")
    blind.add_argument("--out", type=Path, help="reference file; the package's own by default")
    blind.set_defaults(command=_record_blind)

    pretrain = commands.add_parser(
        "pretrain-mini", parents=[common], help="remake the towers and tokenizers of the miniature"
    )
    pretrain.add_argument("names", nargs="*", help=f"{', '.join(MINIATURE_PARTS)}; all by default")
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write to")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.set_defaults(command=_pretrain_mini)

    bench = commands.add_parser("bench", help="measure speed and memory")
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
    projectors.set_defaults(command=_bench_projectors)
    loading = benches.add_parser("data", parents=[common], help="images per second beside PIL and torchvision")
    loading.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: backbone=NAME llm=NAME")
    loading.set_defaults(command=_bench_data)
    return parser


def _train(args: argparse.Namespace) -> None:
    config = load_config(args.arguments)
    from prism_deco.training.run import prepare_run, set_status, train

    if config.evaluate.benchmarks:
        from prism_deco.evaluation import resolve

        resolve(config.evaluate.benchmarks)  # a wrong name must not wait for the end of training
    folder = train(config, prepare_run(config, overwrite=args.overwrite))
    if config.evaluate.benchmarks:
        _score(folder, OmegaConf.to_container(config.evaluate))  # type: ignore[arg-type]
    set_status(folder, "done")
    log.info("The run is in %s; watch it with: tensorboard --logdir %s", folder, config.runs_dir)


def _evaluate(args: argparse.Namespace) -> None:
    folders = [argument for argument in args.arguments if "=" not in argument]
    options = _parse_options([argument for argument in args.arguments if "=" in argument])
    if args.score_only is None:
        if len(folders) != 1:
            raise ValueError("Name the one run to score, for example: prism-deco evaluate runs/RUN_ID benchmark=mini")
        run = Path(folders[0])
        options["benchmarks"] = options.pop("benchmark", None) or _trained_with(run)
        _score(run, options)
        return
    from prism_deco.evaluation import build_benchmark, score_file, table

    if "benchmark" not in options:
        raise ValueError("Name the benchmark of the predictions, for example: benchmark=pope")
    _print(table([score_file(args.score_only, build_benchmark(options.pop("benchmark"), **options))]))


def _score(folder: Path, options: dict[str, Any]) -> None:
    """Scores a run on benchmarks and prints them beside chance and, where it is known, blindness.

    Args:
        options: `benchmarks` (names), `batch_size`, and keys of the benchmarks' YAMLs (split, limit, root).
    """
    from prism_deco.api import load
    from prism_deco.evaluation import build_benchmark, chance, evaluate, resolve, table
    from prism_deco.report.blind import blind_scores

    names, batch_size = resolve(options.pop("benchmarks")), options.pop("batch_size", 64)
    options = {key: value for key, value in options.items() if value is not None}
    model = load(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    results, floors = [], {}
    for name in names:
        benchmark = build_benchmark(name, **options)
        if benchmark.root is None and manifest["benchmarks"]:
            # Benchmarks that come with the training data lie beside it.
            benchmark.root = Path(manifest["benchmarks"])
        own_split = build_benchmark(name).split == benchmark.split
        out = folder / "eval" / (name if own_split else f"{name}-{benchmark.split}")
        results.append(evaluate(model, benchmark, out, batch_size=batch_size, model_id=manifest["model_sha256"]))
        floors[name] = chance(benchmark)
    _print(table(results, floors, blind_scores(model.config, options.get("split"))))


def _trained_with(run: Path) -> str:
    from prism_deco.config import read_config

    benchmarks = read_config(run / "config.yaml").evaluate.benchmarks
    if not benchmarks:
        raise ValueError(f"{run} names no benchmarks of its own: choose some, for example benchmark=table3")
    return benchmarks


def _data_check(args: argparse.Namespace) -> int:
    config = load_config(args.arguments)
    from prism_deco.data import build_source
    from prism_deco.data.check import check
    from prism_deco.data.examples import Encoder
    from prism_deco.llms import build_llm
    from prism_deco.training.compose import group

    llm = build_llm(group(config, "llm"), pretrained=False, device="meta", image_slot=config.recipe.image_slot)
    encoder = Encoder(
        llm,
        max_text_tokens=config.recipe.max_text_tokens,
        max_positions=llm.max_positions,
        tokens_per_image=config.projector.num_tokens or config.recipe.num_tokens,
    )
    out = args.out or Path(config.runs_dir) / "data_check" / config.data.name
    report = check(build_source(group(config, "data")), encoder, out, workers=args.workers, allow=args.allow)
    _print(report.render())
    return report.exit_status


def _data_prepare(args: argparse.Namespace) -> None:
    from prism_deco.data.prepare import plan, prepare, read_dataset

    dataset = read_dataset(args.name)
    _print(plan(dataset, args.root).render())
    if not args.plan:
        prepare(dataset, args.root)


def _record_blind(args: argparse.Namespace) -> None:
    from prism_deco.report.blind import REFERENCE, record

    record(args.run, args.out or REFERENCE)


def _pretrain_mini(args: argparse.Namespace) -> None:
    from prism_deco.data.shapes import corpus
    from prism_deco.llms.train_tokenizer import train_tokenizers
    from prism_deco.registry import unknown
    from prism_deco.training.pretrain_mini import pretrain_tower

    for name in args.names:
        if name not in MINIATURE_PARTS:
            raise unknown("part of the miniature", name, MINIATURE_PARTS)
    for name in args.names or MINIATURE_PARTS:
        if name == "tokenizers":
            train_tokenizers(corpus(args.seed, TOKENIZER_TEXTS), args.out / "tokenizers")
        else:
            pretrain_tower(name, args.out / "towers", args.seed)


def _bench_projectors(args: argparse.Namespace) -> None:
    from prism_deco.bench.projectors import Sizes, bench_projectors, render

    sizes = Sizes(args.in_dim, args.out_dim, tuple(args.in_grid), args.num_tokens, args.batch_size)
    rows = bench_projectors(args.names, sizes, dtypes=args.dtypes, device=args.device, repeats=args.repeats)
    _print(render(rows, sizes, args.device))


def _bench_data(args: argparse.Namespace) -> None:
    config = load_config(args.arguments)
    import tempfile

    from prism_deco.backbones import build_backbone
    from prism_deco.bench.data import bench_data, photographs, render
    from prism_deco.llms import build_llm
    from prism_deco.training.compose import group

    backbone = build_backbone(group(config, "backbone"), pretrained=False, device="meta")
    llm = build_llm(group(config, "llm"), pretrained=False, device="meta")
    with tempfile.TemporaryDirectory() as folder:
        source = photographs(Path(folder))
        rows = bench_data(source, llm, backbone.transform, side=backbone.image_size)
    _print(render(rows, config.backbone.name))


def _parse_options(overrides: list[str]) -> dict[str, Any]:
    options = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}


def _print(renderable: Any) -> None:
    from rich.console import Console

    # A file or a pipe has no width of its own, and 80 columns would break the tables.
    Console(width=None if sys.stdout.isatty() else 120).print(renderable)


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
