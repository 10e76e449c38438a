"""`prism-deco evaluate`: scores of a run on benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prism_deco.commands.common import Subparsers, options_of, own_benchmarks, show


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `evaluate`."""
    parser = subparsers.add_parser("evaluate", parents=[common], help="score a finished run, or a predictions file")
    parser.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    # argparse cannot tell an optional run folder from the first option; the equals sign can.
    parser.add_argument(
        "arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folder; benchmark=NAMES split=S limit=N batch_size=N"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    parser.add_argument("--device", help="cpu | cuda; what the run was trained on by default")
    parser.set_defaults(command=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """Scores a finished run, or a predictions file."""
    folders = [argument for argument in args.arguments if "=" not in argument]
    options = options_of([argument for argument in args.arguments if "=" in argument])
    if args.score_only is None:
        if len(folders) != 1:
            raise ValueError("Name the one run to score, for example: prism-deco evaluate runs/RUN_ID benchmark=mini")
        run = Path(folders[0])
        options["benchmarks"] = options.pop("benchmark", None) or _trained_with(run)
        score_run(run, options, device=args.device, dtype=args.dtype)
        return
    from prism_deco.evaluation import build_benchmark, score_file, table

    if "benchmark" not in options:
        raise ValueError("Name the benchmark of the predictions, for example: benchmark=pope")
    show(table([score_file(args.score_only, build_benchmark(options.pop("benchmark"), **options))]))


def score_run(folder: Path, options: dict[str, Any], *, device: str | None = None, dtype: str | None = None) -> None:
    """Scores a run on benchmarks and prints them beside chance and, where it is known, blindness.

    Args:
        options: `benchmarks` (names), `batch_size`, and keys of the benchmarks' YAMLs (split, limit, root).
        device: cpu | cuda; None is what the run was trained on.
        dtype: float32 | bfloat16; None is bfloat16 after training in `bf16-mixed`, else that of the weights.
    """
    import torch

    from prism_deco.api import load
    from prism_deco.evaluation import build_benchmark, chance, evaluate, local_device, process_group, resolve, table
    from prism_deco.report.blind import blind_scores

    names, batch_size = resolve(options.pop("benchmarks")), options.pop("batch_size", 64)
    options = {key: value for key, value in options.items() if value is not None}
    model = load(folder)
    if dtype := dtype or ("bfloat16" if model.config.trainer.precision == "bf16-mixed" else None):
        model.vlm.cast(getattr(torch, dtype))
    model.vlm.to(local_device(device or model.config.trainer.accelerator))
    computed_in = str(next(model.vlm.lm.parameters()).dtype).removeprefix("torch.")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    about = {"batch_size": batch_size, "model_id": manifest["model_sha256"], "dtype": computed_in}
    results, floors = [], {}
    with process_group() as is_first:
        for name in names:
            benchmark = build_benchmark(name, **options)
            benchmark.root = benchmark.root or own_benchmarks(folder)
            own_split = build_benchmark(name).split == benchmark.split
            out = folder / "eval" / (benchmark.name if own_split else f"{benchmark.name}-{benchmark.split}")
            results.append(evaluate(model, benchmark, out, **about))
            if is_first:
                floors[benchmark.name] = chance(benchmark)
    if is_first:
        show(table(results, floors, blind_scores(model.config, options.get("split"))))


def _trained_with(run: Path) -> str:
    from prism_deco.config import read_config

    benchmarks = read_config(run / "config.yaml").evaluate.benchmarks
    if not benchmarks:
        raise ValueError(f"{run} names no benchmarks of its own: choose some, for example benchmark=table3")
    return benchmarks
