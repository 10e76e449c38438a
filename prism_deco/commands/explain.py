"""`prism-deco explain`: where each generated word looked."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_deco.commands.common import Asked, asked_of, import_named_plugins, own_benchmarks, show
from prism_deco.commands.scoring import finished_run, stored_keys
from prism_deco.config.choices import choice_name, results_name
from prism_deco.errors import UsageError
from prism_deco.files import check_folder, check_writable, read_json

if TYPE_CHECKING:  # maps need torch
    from prism_deco.explain import Section

log = logging.getLogger(__name__)


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments", nargs="*", metavar="RUN KEY=VALUE", help="run folders; benchmark=NAME limit=N plugins=[MODULE]"
    )
    parser.add_argument("--image", type=Path, action=_Once, help="explain an answer about this image")
    parser.add_argument("--prompt", help="the question about it")
    parser.add_argument("--answer", help="the text to explain (default: the model's own answer)")
    parser.add_argument("--out", type=Path, help="folder for pictures, numbers and pages (default: one in RUN/explain)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type to compute in (default: the run's)")
    parser.add_argument("--device", default="cpu", help="cpu | cuda (default: %(default)s)")


class _Once(argparse.Action):
    """Refuses a second value, which argparse would silently let replace the first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice: relevance maps explain one image.")
        setattr(namespace, self.dest, values)


def explain(args: argparse.Namespace) -> None:
    """Explain one answer of one or more runs, or measure the relevance maps of a benchmark's questions."""
    asked = asked_of(args.arguments, ["plugins"])
    import_named_plugins(asked)
    _check_arguments(args, asked)
    import torch

    from prism_deco.distributed import requested_device
    from prism_deco.explain import side_by_side, write_page

    for run in asked.runs:  # check all runs before the first one starts
        check_writable(args.out or run / "explain", "Name a folder for the results with --out.")
    place = {"device": requested_device(args.device), "dtype": getattr(torch, args.dtype) if args.dtype else None}
    if asked.benchmarks is None:
        about = _question_name(args)
        sections = _explain_question(args, asked.runs, place)
    else:
        about, sections = _explain_benchmark(args, asked, place)
    if len(asked.runs) > 1:
        page = (args.out or asked.runs[0].parent) / _comparison_name(asked.runs, about)
        write_page(page, " and ".join(run.name for run in asked.runs), side_by_side(sections))
        log.info("The runs stand side by side in %s", page)


def _explain_question(args: argparse.Namespace, runs: list[Path], place: dict[str, Any]) -> list[list[Section]]:
    """The sections of the page, by run."""
    from prism_deco.api import load
    from prism_deco.explain import ExplainExample, explain_image

    example = ExplainExample(args.image, args.prompt, args.answer)
    sections = []
    for run in runs:
        model = load(run, **place)
        folder = _out(args, run, len(runs)) or run / "explain" / "images" / _question_name(args)
        section = explain_image(model.vlm, model.llm, example, folder, run=run.name)
        # All maps of a panel explain the same answer.
        answer = next(iter(section.panels[0].maps.values())).answer
        sys.stdout.write(f"{run.name}: {answer}\n{folder / 'index.html'}\n")
        sections.append([section])
    return sections


def _explain_benchmark(
    args: argparse.Namespace, asked: Asked, place: dict[str, Any]
) -> tuple[str, list[list[Section]]]:
    """The name of the results folder, and the sections of the page by run."""
    from prism_deco.evaluation.choose import prepare_one
    from prism_deco.explain import MapTable

    assert asked.benchmarks is not None
    name = asked.benchmarks
    options: dict[Path, dict[str, Any]] = {}
    for run in asked.runs:  # check all runs before the first one starts
        finished_run(run)
        stored = stored_keys(run, choice_name(name), leave_out=["limit"])
        # The later ones win: keys of the run, then KEY=, then benchmark.NAME.KEY= of the only benchmark.
        options[run] = stored | asked.options | next(iter(asked.own.values()), {})
        prepare_one(name, options[run], root=own_benchmarks(run))
    results = []
    sections = []
    for run in asked.runs:
        result, pages = measure_relevance(run, name, options[run], out=_out(args, run, len(asked.runs)), **place)
        results.append(result)
        sections.append(pages)
    show(MapTable(results))
    return results_name(name, options[asked.runs[0]].get("split")), sections


def _out(args: argparse.Namespace, run: Path, count: int) -> Path | None:
    """The folder of a run's results, if `--out` is given; each of several runs has its own below it."""
    return args.out / run.name if args.out and count > 1 else args.out


def _question_name(args: argparse.Namespace) -> str:
    """A folder name for a question about an image, unique by a hash of both."""
    asked = json.dumps([str(args.image.absolute()), args.prompt, args.answer])
    return f"{args.image.stem[:40]}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"


def _comparison_name(runs: list[Path], about: str) -> str:
    """The file name of the page of a comparison, unique by its runs."""
    names = "-vs-".join(run.name for run in runs)
    if len(names) > 150:  # a file name has at most 255 bytes
        names = f"{names[:140]}-{hashlib.sha256(names.encode()).hexdigest()[:6]}"
    return f"explain-{about}-{names}.html"


def measure_relevance(
    run: Path, name: str, options: dict[str, Any], *, out: Path | None = None, **place: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Measures the relevance maps of a finished run on a benchmark's questions.

    Args:
        options: keys of the benchmark's YAML (split, limit, root).
        out: folder of the results; None is the benchmark's folder in the run's `explain`.
        place: device and dtype of the model.
    """
    from prism_deco.api import load
    from prism_deco.evaluation.choose import prepare_one
    from prism_deco.explain import explain_set

    benchmark = prepare_one(name, options, root=own_benchmarks(run))
    folder = out or run / "explain" / results_name(name, benchmark.split)
    about = {"benchmark": benchmark.name, "split": benchmark.split}
    model = load(run, **place)
    return explain_set(model.vlm, model.llm, _examples(benchmark), folder, run=run.name, about=about)


def has_relevance(run: Path, name: str, split: str | None) -> bool:
    """Whether the relevance maps of a benchmark have been measured. Earlier versions wrote them to `explain` itself."""
    from prism_deco.evaluation import build_benchmark

    if (run / "explain" / results_name(name, split) / "metrics.json").is_file():
        return True
    own = build_benchmark(name)
    earlier = run / "explain" / "metrics.json"
    about = read_json(earlier) if earlier.is_file() else {}
    return (about.get("benchmark"), about.get("split")) == (own.name, split or own.split)


def _check_arguments(args: argparse.Namespace, asked: Asked) -> None:
    from prism_deco.data.images import open_image
    from prism_deco.evaluation.choose import check_keys

    check_keys(asked.benchmarks or (), asked.options, asked.own, also=("benchmark", "plugins"))
    given = {"--image": args.image, "--prompt": args.prompt, "--answer": args.answer}
    one = [name for name, value in given.items() if value is not None]
    keys = [*(["benchmark"] if asked.benchmarks else []), *asked.options, *(f"benchmark.{name}" for name in asked.own)]
    if one and keys:
        others = ", ".join(f"{key}=" for key in keys)
        raise UsageError(f"{', '.join(one)} concern one image, {others} a benchmark: leave out one or the other.")
    if not asked.runs or (asked.benchmarks is None and (args.image is None or not args.prompt)):
        raise UsageError(
            "Name runs and either one question or a benchmark, for example: prism-deco explain runs/RUN_ID --image "
            'cat.jpg --prompt "What is it?"  or  prism-deco explain runs/RUN_ID benchmark=mini_refcoco limit=100'
        )
    if args.image is not None:
        open_image(args.image)  # fail before the model is loaded
    names = [run.name for run in asked.runs]
    shared = [name for name in names if names.count(name) > 1]
    if args.out is not None and shared:
        raise UsageError(f"Two runs are named {shared[0]} and would share a folder in --out: explain one at a time.")
    for run in asked.runs:
        check_folder(run)


def _examples(benchmark: Any) -> list[Any]:
    """A benchmark's questions as examples to explain. If the target is a box, it is also the answer to explain."""
    from prism_deco.explain import ExplainExample

    first = benchmark.variants[0]
    examples = []
    for item in benchmark.items():
        # Other variants ask the same questions again.
        if item.target.get("variant", first) == first:
            if len(item.paths) != 1:
                raise UsageError(f"Question {item.question_id} has {len(item.paths)} images: relevance needs one.")
            box = item.target.get("box")
            answer = f"[{', '.join(f'{edge:.2f}' for edge in box)}]" if box else None
            where = tuple(box) if box else None
            examples.append(ExplainExample(item.paths[0], item.prompt, answer, where, item.question_id))
    return examples
