"""`prism-deco evaluate`: scores of a run on benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prism_deco.commands.common import Subparsers, options_of, own_benchmarks, show
from prism_deco.errors import UsageError


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `evaluate`."""
    parser = subparsers.add_parser("evaluate", parents=[common], help="score a finished run, or a predictions file")
    parser.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    # argparse cannot tell an optional run folder from the first option; the equals sign can.
    parser.add_argument(
        "arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folder; benchmark=NAMES split=S limit=N batch_size=N"
    )
    parser.add_argument("--out", type=Path, help="folder of the results, one folder per benchmark in it (RUN/eval)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    parser.add_argument("--device", help="cpu | cuda; what the run was trained on by default")
    parser.set_defaults(command=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """Scores a finished run, or a predictions file."""
    folders = [argument for argument in args.arguments if "=" not in argument]
    options = options_of([argument for argument in args.arguments if "=" in argument])
    if args.score_only is None:
        if len(folders) != 1:
            raise UsageError("Name the one run to score, for example: prism-deco evaluate runs/RUN_ID benchmark=mini")
        run = Path(folders[0])
        finished_run(run)
        options["benchmarks"] = options.pop("benchmark", None) or _trained_with(run)
        score_run(run, options, out=args.out, device=args.device, dtype=args.dtype)
        return
    from prism_deco.evaluation import build_benchmark, score_file, table

    given = {"--out": args.out, "--dtype": args.dtype, "--device": args.device, "a run": folders}
    if unused := [name for name, value in given.items() if value]:
        raise UsageError(f"--score-only loads no model and writes nothing: leave out {', '.join(unused)}.")
    if "benchmark" not in options:
        raise UsageError("Name the benchmark of the predictions, for example: benchmark=pope")
    show(table([score_file(args.score_only, build_benchmark(options.pop("benchmark"), **options))]))


def score_run(
    folder: Path,
    options: dict[str, Any],
    *,
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Scores a run on benchmarks and prints them beside chance and, where it is known, blindness.

    Everything that can be wrong with what is asked is found before the model is loaded.

    Args:
        options: `benchmarks` (names), `batch_size`, and keys of the benchmarks' YAMLs (split, limit, root).
        out: folder of the results; None is the run's `eval`.
        device: cpu | cuda, which must be there; None is what the run was trained on, or the CPU.
        dtype: float32 | bfloat16; None is bfloat16 after training in `bf16-mixed`, else that of the weights.
    """
    manifest = finished_run(folder)
    import torch

    from prism_deco.api import load
    from prism_deco.evaluation import chance, evaluate, local_device, process_group, resolve, table
    from prism_deco.evaluation.choose import prepare, results_name
    from prism_deco.evaluation.ranks import asked_device
    from prism_deco.report.blind import blind_scores

    chosen = asked_device(device) if device else None
    names, batch_size = resolve(options.pop("benchmarks")), options.pop("batch_size", 64)
    if type(batch_size) is not int or batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be a whole number above 0.")
    benchmarks = prepare(names, options, root=own_benchmarks(folder))
    model = load(folder)
    if dtype := dtype or ("bfloat16" if model.config.trainer.precision == "bf16-mixed" else None):
        model.vlm.cast(getattr(torch, dtype))
    model.vlm.to(chosen or local_device(model.config.trainer.accelerator))
    computed_in = str(next(model.vlm.lm.parameters()).dtype).removeprefix("torch.")
    about = {"batch_size": batch_size, "model_id": manifest["model_sha256"], "dtype": computed_in}
    results, floors = [], {}
    with process_group() as is_first:
        for name, benchmark in zip(names, benchmarks, strict=True):
            results_folder = (out or folder / "eval") / results_name(name, benchmark.split)
            results.append(evaluate(model, benchmark, results_folder, **about))
            if is_first:
                floors[benchmark.name] = chance(benchmark)
    if is_first:
        show(table(results, floors, blind_scores(model.config, options.get("split"))))


def finished_run(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run, whose plug-ins are imported: benchmarks may be theirs.

    Raises:
        UsageError: the folder is none, such as an export, which knows neither its data nor the hash of its weights.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give a run folder such as runs/RUN_ID.")
    path = folder / "manifest.json"
    if path.is_file():
        from prism_deco.config import read_config
        from prism_deco.config.registry import import_plugins

        import_plugins(read_config(folder / "model" / "config.yaml").plugins)
        return json.loads(path.read_text(encoding="utf-8"))
    if (folder / "backbone.json").is_file():  # beside the weights, in every model folder
        raise UsageError(
            f"{folder} is a model's folder or an export, no run folder: benchmarks need the run that it came from, "
            "such as runs/RUN_ID. `prism-deco chat` and `explain --image` take exports."
        )
    raise UsageError(f"{folder} holds no finished run: it has no manifest.json.")


def _trained_with(run: Path) -> str:
    from prism_deco.config import read_config

    benchmarks = read_config(run / "config.yaml").evaluate.benchmarks
    if not benchmarks:
        raise UsageError(f"{run} names no benchmarks of its own: choose some, for example benchmark=table3")
    return benchmarks
