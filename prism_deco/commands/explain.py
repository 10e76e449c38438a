"""`prism-deco explain`: where each generated word looked."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from prism_deco.commands.common import Subparsers, options_of, own_benchmarks, show

log = logging.getLogger(__name__)


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `explain`."""
    parser = subparsers.add_parser("explain", parents=[common], help="show where each generated word looked (R-GAE)")
    parser.add_argument("arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folders; benchmark=NAME limit=N")
    parser.add_argument("--image", type=Path, help="explain an answer about this image")
    parser.add_argument("--prompt", help="the question about it")
    parser.add_argument("--answer", help="the text to explain; the model's own answer by default")
    parser.add_argument("--out", type=Path, help="folder for pictures, numbers and pages (RUN/explain)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.add_argument("--chunk", type=int, help="answer tokens per backward pass; what memory allows by default")
    parser.add_argument("--through-backbone", action="store_true", help="continue to the pixels' patches")
    parser.set_defaults(command=explain)


def explain(args: argparse.Namespace) -> None:
    """Explains one answer, or measures the maps of a benchmark's questions, for one or more runs."""
    runs = [Path(argument) for argument in args.arguments if "=" not in argument]
    options = options_of([argument for argument in args.arguments if "=" in argument])
    asked = args.image is not None and args.prompt is not None
    if not runs or asked == ("benchmark" in options):
        raise ValueError(
            "Name runs and either one question or a benchmark, for example: prism-deco explain runs/RUN_ID --image "
            'cat.jpg --prompt "What is it?"  or  prism-deco explain runs/RUN_ID benchmark=mini_refcoco limit=100'
        )
    import torch

    from prism_deco.api import load
    from prism_deco.explain import Example, explain_image, side_by_side, table, write_page

    example = Example(args.image, args.prompt, args.answer) if args.image is not None and args.prompt else None
    results, sections = [], []
    for run in runs:
        place = {"device": args.device, "dtype": getattr(torch, args.dtype) if args.dtype else None}
        out = (args.out / run.name if len(runs) > 1 else args.out) if args.out else run / "explain"
        if example is not None:
            model = load(run, **place)
            more = {"chunk": args.chunk, "through_backbone": args.through_backbone}
            sections.append([explain_image(model.vlm, model.llm, example, out, run=run.name, **more)])
            continue
        about = {key: value for key, value in options.items() if key != "benchmark"}
        result, pages = measure_relevance(run, options["benchmark"], about, out=out, chunk=args.chunk, **place)
        results.append(result)
        sections.append(pages)
    if results:
        show(table(results))
    if len(runs) > 1:
        page = (args.out or runs[0].parent) / "explain.html"
        write_page(page, " and ".join(run.name for run in runs), side_by_side(sections))
        log.info("The runs stand side by side in %s", page)


def measure_relevance(
    run: Path, name: str, options: dict[str, Any], *, out: Path | None = None, chunk: int | None = None, **place: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Measures a run's maps of a benchmark's questions.

    Args:
        options: keys of the benchmark's YAML (split, limit, root).
        place: device and dtype of the model.
    """
    from prism_deco.api import load
    from prism_deco.explain import explain_set

    model = load(run, **place)
    benchmark, examples = _examples(run, name, options)
    about = {"benchmark": benchmark.name, "split": benchmark.split}
    return explain_set(model.vlm, model.llm, examples, out or run / "explain", run=run.name, about=about, chunk=chunk)


def _examples(run: Path, name: str, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A benchmark's questions as examples to explain; a box that is asked for is also the answer."""
    from prism_deco.evaluation import build_benchmark
    from prism_deco.explain import Example

    benchmark = build_benchmark(name, **{key: value for key, value in options.items() if value is not None})
    benchmark.root = benchmark.root or own_benchmarks(run)
    first = benchmark.variants[0]
    examples = []
    for item in benchmark.items():
        if item.target.get("variant", first) == first:
            box = item.target.get("box")
            answer = f"[{', '.join(f'{edge:.2f}' for edge in box)}]" if box else None
            examples.append(Example(item.path, item.prompt, answer, tuple(box) if box else None, item.question_id))
    return benchmark, examples
