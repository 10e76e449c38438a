"""`prism-deco explain`: where each generated word looked."""

from __future__ import annotations

import argparse
import json
import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prism_deco.commands.common import Asked, Subparsers, asked_of, import_named_plugins, own_benchmarks, show
from prism_deco.commands.evaluate import finished_run
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.files import check_writable

log = logging.getLogger(__name__)


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `explain`."""
    parser = subparsers.add_parser("explain", parents=[common], help="show where each generated word looked (R-GAE)")
    parser.add_argument("arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folders; benchmark=NAME limit=N")
    parser.add_argument("--image", type=Path, help="explain an answer about this image")
    parser.add_argument("--prompt", help="the question about it")
    parser.add_argument("--answer", help="the text to explain; the model's own answer by default")
    parser.add_argument("--out", type=Path, help="folder for pictures, numbers and pages (one in RUN/explain)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute in this type; the run's by default")
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.add_argument("--chunk", type=int, help="answer tokens per backward pass; what memory allows by default")
    parser.add_argument("--through-backbone", action="store_true", help="continue to the pixels' patches")
    parser.set_defaults(command=explain)


def explain(args: argparse.Namespace) -> None:
    """Explains one answer, or measures the maps of a benchmark's questions, for one or more runs."""
    asked = asked_of(args.arguments, ["plugins"])
    runs, name = asked.runs, asked.benchmarks
    options: dict[str, Any] = dict(asked.options)
    import_named_plugins(asked)
    _check_arguments(args, asked)
    import torch

    from prism_deco.api import load
    from prism_deco.evaluation.ranks import asked_device
    from prism_deco.explain import Example, explain_image, side_by_side, table, write_page

    place = {"device": asked_device(args.device), "dtype": getattr(torch, args.dtype) if args.dtype else None}
    example = Example(args.image, args.prompt, args.answer) if args.image is not None else None
    if name is not None:  # what is wrong with one of the runs must not wait for those before it
        options |= next(iter(asked.own.values()), {})
        for run in runs:
            check_writable(args.out or run / "explain", "Name a folder for the results with --out.")
            _benchmark(run, name, options)
    results, sections = [], []
    for run in runs:
        out = (args.out / run.name if len(runs) > 1 else args.out) if args.out else None
        if name is None:
            assert example is not None
            model = load(run, **place)
            more = {"chunk": args.chunk, "through_backbone": args.through_backbone}
            folder = out or run / "explain" / "image"
            sections.append([explain_image(model.vlm, model.llm, example, folder, run=run.name, **more)])
            continue
        result, pages = measure_relevance(run, name, options, out=out, chunk=args.chunk, **place)
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
        out: folder of the results; None is the benchmark's in the run's `explain`.
        place: device and dtype of the model.
    """
    benchmark = _benchmark(run, name, options)
    from prism_deco.api import load
    from prism_deco.evaluation.choose import results_name
    from prism_deco.explain import explain_set

    folder = out or run / "explain" / results_name(name, benchmark.split)
    about = {"benchmark": benchmark.name, "split": benchmark.split}
    model = load(run, **place)
    return explain_set(model.vlm, model.llm, _examples(benchmark), folder, run=run.name, about=about, chunk=chunk)


def has_relevance(run: Path, name: str, split: str | None) -> bool:
    """Whether the maps of a benchmark's questions have been measured; all runs had one folder for that once."""
    from prism_deco.evaluation import build_benchmark
    from prism_deco.evaluation.choose import results_name

    if (run / "explain" / results_name(name, split) / "metrics.json").is_file():
        return True
    earlier, own = run / "explain" / "metrics.json", build_benchmark(name)
    about = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
    return (about.get("benchmark"), about.get("split")) == (own.name, split or own.split)


def _check_arguments(args: argparse.Namespace, asked: Asked) -> None:
    given = {"--image": args.image, "--prompt": args.prompt, "--answer": args.answer}
    one = [name for name, value in given.items() if value is not None]
    one += ["--through-backbone"] * args.through_backbone
    keys = [*(["benchmark"] if asked.benchmarks else []), *asked.options, *(f"benchmark.{name}" for name in asked.own)]
    if one and keys:
        others = ", ".join(f"{key}=" for key in keys)
        raise UsageError(f"{', '.join(one)} concern one image, {others} a benchmark: leave out one or the other.")
    if asked.benchmarks:
        from prism_deco.evaluation.choose import check_keys, check_names

        check_keys(asked.benchmarks, asked.options, also=("benchmark", "plugins"))
        check_names(asked.benchmarks, asked.own)
    for key in asked.options if asked.benchmarks is None else ():
        if get_close_matches(key, ["benchmark", "plugins"]):  # a slip; others are a benchmark's that was not named
            raise unknown("key", key, ["benchmark", "plugins"])
    if not asked.runs or (asked.benchmarks is None and (args.image is None or not args.prompt)):
        raise UsageError(
            "Name runs and either one question or a benchmark, for example: prism-deco explain runs/RUN_ID --image "
            'cat.jpg --prompt "What is it?"  or  prism-deco explain runs/RUN_ID benchmark=mini_refcoco limit=100'
        )
    if args.image is not None and not args.image.is_file():
        raise UsageError(f"--image {args.image}: there is no such file.")
    for run in asked.runs:
        if not run.is_dir():
            raise UsageError(f"{run} is not a folder: give a run folder such as runs/RUN_ID.")


def _benchmark(run: Path, name: str, options: dict[str, Any]) -> Any:
    """The benchmark for a run, its files read."""
    finished_run(run)
    from prism_deco.evaluation.choose import prepare_one

    return prepare_one(name, options, root=own_benchmarks(run))


def _examples(benchmark: Any) -> list[Any]:
    """A benchmark's questions as examples to explain; a box that is asked for is also the answer."""
    from prism_deco.explain import Example

    first = benchmark.variants[0]
    examples = []
    for item in benchmark.items():
        if item.target.get("variant", first) == first:
            if len(item.paths) != 1:
                raise UsageError(f"Question {item.question_id} has {len(item.paths)} images: relevance needs one.")
            box = item.target.get("box")
            answer = f"[{', '.join(f'{edge:.2f}' for edge in box)}]" if box else None
            examples.append(Example(item.paths[0], item.prompt, answer, tuple(box) if box else None, item.question_id))
    return examples
