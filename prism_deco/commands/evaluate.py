"""`prism-deco evaluate`: scores a run on benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_deco.commands.common import Asked, asked_of, import_named_plugins, show
from prism_deco.commands.scoring import Tokens, blind_scores, finished_run, score_run, stored_keys
from prism_deco.config import parse_value, read_config
from prism_deco.config.choices import (
    YAML_SUFFIXES,
    choice_name,
    choices,
    group_keys,
    resolve_asks,
    resolve_benchmarks,
)
from prism_deco.config.schema import AS_TRAINED
from prism_deco.errors import UsageError
from prism_deco.files import check_writable

KEYS = ("ask", "batch_size", "compressor", "compressor.*", "num_tokens", "plugins")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    # One list for the optional run folder and the settings, which argparse cannot tell apart.
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RUN KEY=VALUE",
        help="run folder; benchmark=NAMES (default: the run's) split=S limit=N ask=NAMES batch_size=N "
        "num_tokens=N compressor=NAME compressor.KEY=VALUE benchmark.NAME.root=DIR "
        "plugins=[MODULE]",
    )
    parser.add_argument(
        "--lmms-eval",
        metavar="TASKS",
        help="score on tasks of lmms-eval instead, such as ocrbench,docvqa_val,chartqa,mmstar,cv_bench (needs pip "
        "install prism-deco[lmms-eval]); limit=N and batch_size=N apply",
    )
    parser.add_argument("--out", type=Path, help="folder of the results, one folder per benchmark (default: RUN/eval)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type to compute in (default: the run's)")
    parser.add_argument("--device", help="cpu | cuda (default: what the run was trained on)")


def evaluate(args: argparse.Namespace) -> None:
    """Score a finished run on benchmarks, or a predictions file without a model."""
    asked = asked_of(args.arguments, KEYS)
    import_named_plugins(asked)
    from prism_deco.evaluation.choose import check_keys

    also = ("benchmark", *KEYS)
    check_keys(asked.benchmarks or (), asked.options, asked.own, also=also)
    if args.score_only is not None:
        given = {"--out": args.out, "--dtype": args.dtype, "--device": args.device, "a run": asked.runs}
        if unused := [name for name, value in given.items() if value]:
            raise UsageError(f"--score-only loads no model and writes nothing: leave out {', '.join(unused)}.")
        _score_file(args.score_only, asked)
        return
    if len(asked.runs) != 1:
        raise UsageError("Name one run to score, for example: prism-deco evaluate runs/RUN_ID benchmark=mini")
    (run,) = asked.runs
    if args.lmms_eval:
        _score_elsewhere(run, args, asked)
        return
    finished_run(run)
    names = asked.benchmarks or read_config(run / "config.yaml").evaluate.benchmarks
    if not names:
        raise UsageError(f"The configuration of {run} has no benchmarks: choose some, for example benchmark=table3")
    check_keys(names, asked.options, asked.own, also=also)
    # Keys of a group, then of the run, then KEY= for all benchmarks, then benchmark.NAME.KEY=: the later ones win.
    own = {}
    of_groups = group_keys(names)
    for name in map(choice_name, resolve_benchmarks(names)):
        usual = of_groups.get(name, {}) | stored_keys(run, name)
        usual = {key: value for key, value in usual.items() if key not in asked.options}
        own[name] = usual | asked.own.get(name, {})
    tokens = _tokens_of(asked.others)
    if tokens.num_tokens is not None:
        tokens.check(read_config(run / "model" / "config.yaml"))
    batch_size = _count(asked.others, "batch_size", 64)
    place = {"out": args.out, "device": args.device, "dtype": args.dtype}
    from prism_deco.distributed import World

    world = World.of_torchrun()
    with world.joined():
        asks = resolve_asks(asked.others.get("ask", AS_TRAINED))
        score_run(run, names, asked.options, own, world=world, asks=asks, batch_size=batch_size, tokens=tokens, **place)


def _count(given: Mapping[str, str], key: str, default: int | None = None) -> Any:
    """The value of a key, a whole number above 0."""
    value = parse_value(key, given[key]) if key in given else default
    # `type`, since True is an int; a default (also None) is not checked.
    if value is not default and (type(value) is not int or value < 1):
        raise UsageError(f"{key}={value} must be a whole number above 0.")
    return value


def _score_elsewhere(run: Path, args: argparse.Namespace, asked: Asked) -> None:
    """Scores a run with lmms-eval and prints the scores."""
    unused = [*asked.own, *({*asked.options, *asked.others} - {"limit", "batch_size", "plugins"})]
    if asked.benchmarks or unused:
        raise UsageError(
            f"--lmms-eval runs its own tasks: leave out {', '.join(unused or ['benchmark='])}. The only settings it "
            "takes are limit=N, batch_size=N and plugins=[MODULE]."
        )
    if importlib.util.find_spec("lmms_eval") is None:
        raise UsageError('lmms-eval is not installed: pip install "prism-deco[lmms-eval]"')
    tasks = [task.strip() for task in args.lmms_eval.split(",")]
    for task in tasks:
        if task.endswith(YAML_SUFFIXES) and not Path(task).is_file():
            raise UsageError(f"--lmms-eval {task}: there is no such file.")
    limit = _count(asked.options, "limit")  # per task; lmms-eval would take a fraction as a share of all questions
    own = [task for task in tasks if task in choices("benchmark")]
    if own and args.out is None:
        raise UsageError(
            f"{', '.join(own)} would replace the results of prism_deco's own benchmark: use benchmark={','.join(own)}, "
            "or name another folder with --out."
        )
    manifest = finished_run(run)
    out = args.out or run / "eval"
    check_writable(out, "Name a folder for the results with --out.")
    from prism_deco.evaluation import table
    from prism_deco.integrations.lmms_eval_scores import score_tasks

    settings = {"batch_size": _count(asked.others, "batch_size", 64), "device": args.device, "dtype": args.dtype}
    show(table(score_tasks(run, tasks, out, model_id=manifest["model_sha256"], limit=limit, **settings)))


def _tokens_of(given: Mapping[str, str]) -> Tokens:
    """The visual tokens set by the keys `num_tokens`, `compressor` and `compressor.KEY`."""
    num_tokens = _count(given, "num_tokens")
    compressor = given.get("compressor")
    options = {
        key.partition(".")[2]: parse_value(key, text) for key, text in given.items() if key.startswith("compressor.")
    }
    if compressor and num_tokens is None:
        raise UsageError(f"compressor={compressor} needs a number of visual tokens: num_tokens=64, for example.")
    if options and not compressor:
        raise UsageError(f"compressor.{next(iter(options))} belongs to no compressor: name one, compressor=NAME.")
    return Tokens(num_tokens, compressor, options)


def _score_file(path: Path, asked: Asked) -> None:
    """Prints the score of a predictions file beside chance and, if the file is in a run folder, the blind score."""
    from prism_deco.evaluation import build_benchmark, chance, load_predictions, score_file, table

    if asked.benchmarks is None:
        raise UsageError("Name the benchmark of the predictions, for example: benchmark=pope")
    # A file has the predictions of one benchmark, so keys of single benchmarks can only be its own.
    keys = asked.options | next(iter(asked.own.values()), {})
    benchmark = build_benchmark(asked.benchmarks, **keys)
    result = score_file(path, benchmark, chosen="variants" in keys)
    name, folder = benchmark.name, path.absolute().parent  # eval/<benchmark> or eval/<benchmark>-<split> of a run
    # That of the run, two folders up. Files elsewhere, such as those of other numbers of tokens, get no blind score.
    config = folder.parents[1] / "config.yaml"
    blind = {}
    if config.is_file():
        benchmark.split = folder.name.removeprefix(name).removeprefix("-") or benchmark.split
        blind = blind_scores(read_config(config), [benchmark])
    show(table([result], {name: chance(benchmark, load_predictions(path))}, blind))
