"""What the commands of `prism-deco` do: the configuration meets the rooms of the package here.

Heavy imports stand inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prism_deco.config import load_config
from prism_deco.stages import run as run_stages
from prism_deco.stages import split

log = logging.getLogger(__name__)

MINIATURE_PARTS = ("mini_clip", "mini_siglip", "mini_dinov2", "tokenizers")
"""What `pretrain-mini` makes."""

TOKENIZER_TEXTS = 500
"""Conversations that the miniature's tokenizers are trained on."""


def train(args: argparse.Namespace) -> int:
    """Composes, trains and scores a model; goes on where an earlier call of the same run has stopped."""
    stages = split(args.arguments)
    config = stages[-1].config if stages else load_config(args.arguments)
    asked = [names for names in (config.evaluate.benchmarks, config.evaluate.relevance) if names]
    if asked:
        from prism_deco.evaluation import resolve

        resolve(",".join(asked))  # a wrong name must not wait for the end of training
    if stages:
        flags = {"--overwrite": args.overwrite, "--force": args.force, "--debug": args.debug}
        return run_stages(stages, [flag for flag, is_set in flags.items() if is_set])
    from prism_deco.training.session import run

    def score(folder: Path) -> None:
        options: dict[str, Any] = OmegaConf.to_container(config.evaluate)  # type: ignore[assignment]
        relevance, limit = options.pop("relevance"), options.pop("relevance_limit")
        if options["benchmarks"]:
            _score(folder, dict(options))
        if relevance:
            _measure_relevance(folder, relevance, {"split": options["split"], "limit": limit})

    # The other processes of this machine get the same settings; what becomes of an earlier run is decided once.
    arguments = ["train", *args.arguments, *(["--debug"] if args.debug else [])]
    scoring = score if asked else None
    return run(config, scoring, overwrite=args.overwrite, force=args.force, arguments=arguments)


def evaluate(args: argparse.Namespace) -> None:
    """Scores a finished run, or a predictions file."""
    folders = [argument for argument in args.arguments if "=" not in argument]
    options = _parse_options([argument for argument in args.arguments if "=" in argument])
    if args.score_only is None:
        if len(folders) != 1:
            raise ValueError("Name the one run to score, for example: prism-deco evaluate runs/RUN_ID benchmark=mini")
        run = Path(folders[0])
        options["benchmarks"] = options.pop("benchmark", None) or _trained_with(run)
        _score(run, options, device=args.device, dtype=args.dtype)
        return
    from prism_deco.evaluation import build_benchmark, score_file, table

    if "benchmark" not in options:
        raise ValueError("Name the benchmark of the predictions, for example: benchmark=pope")
    _print(table([score_file(args.score_only, build_benchmark(options.pop("benchmark"), **options))]))


def _score(folder: Path, options: dict[str, Any], *, device: str | None = None, dtype: str | None = None) -> None:
    """Scores a run on benchmarks and prints them beside chance and, where it is known, blindness.

    Args:
        options: `benchmarks` (names), `batch_size`, and keys of the benchmarks' YAMLs (split, limit, root).
        device: cpu | cuda; None is what the run was trained on.
        dtype: float32 | bfloat16; None is that of the weights.
    """
    import torch

    from prism_deco.api import load
    from prism_deco.evaluation import build_benchmark, chance, evaluate, local_device, process_group, resolve, table
    from prism_deco.report.blind import blind_scores

    names, batch_size = resolve(options.pop("benchmarks")), options.pop("batch_size", 64)
    options = {key: value for key, value in options.items() if value is not None}
    model = load(folder, dtype=getattr(torch, dtype) if dtype else None)
    model.vlm.to(local_device(device or ("cpu" if model.config.trainer.accelerator == "cpu" else "cuda")))
    computed_in = str(next(model.vlm.lm.parameters()).dtype).removeprefix("torch.")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    about = {"batch_size": batch_size, "model_id": manifest["model_sha256"], "dtype": computed_in}
    results, floors = [], {}
    with process_group() as is_first:
        for name in names:
            benchmark = build_benchmark(name, **options)
            benchmark.root = benchmark.root or _own_benchmarks(folder)
            own_split = build_benchmark(name).split == benchmark.split
            out = folder / "eval" / (benchmark.name if own_split else f"{benchmark.name}-{benchmark.split}")
            results.append(evaluate(model, benchmark, out, **about))
            if is_first:
                floors[benchmark.name] = chance(benchmark)
    if is_first:
        _print(table(results, floors, blind_scores(model.config, options.get("split"))))


def _own_benchmarks(run: Path) -> Path | None:
    """The folder of the benchmarks that came with the training data, if any did."""
    place = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["benchmarks"]
    return Path(place) if place else None


def _trained_with(run: Path) -> str:
    from prism_deco.config import read_config

    benchmarks = read_config(run / "config.yaml").evaluate.benchmarks
    if not benchmarks:
        raise ValueError(f"{run} names no benchmarks of its own: choose some, for example benchmark=table3")
    return benchmarks


def explain(args: argparse.Namespace) -> None:
    """Explains one answer, or measures the maps of a benchmark's questions, for one or more runs."""
    runs = [Path(argument) for argument in args.arguments if "=" not in argument]
    options = _parse_options([argument for argument in args.arguments if "=" in argument])
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
        result, pages = _measure_relevance(run, options["benchmark"], about, out=out, chunk=args.chunk, **place)
        results.append(result)
        sections.append(pages)
    if results:
        _print(table(results))
    if len(runs) > 1:
        page = (args.out or runs[0].parent) / "explain.html"
        write_page(page, " and ".join(run.name for run in runs), side_by_side(sections))
        log.info("The runs stand side by side in %s", page)


def _measure_relevance(
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
    benchmark.root = benchmark.root or _own_benchmarks(run)
    first = benchmark.variants[0]
    examples = []
    for item in benchmark.items():
        if item.target.get("variant", first) == first:
            box = item.target.get("box")
            answer = f"[{', '.join(f'{edge:.2f}' for edge in box)}]" if box else None
            examples.append(Example(item.path, item.prompt, answer, tuple(box) if box else None, item.question_id))
    return benchmark, examples


def chat(args: argparse.Namespace) -> None:
    """A conversation about an image."""
    import torch

    from prism_deco.api import load
    from prism_deco.chat import Chat, converse, read_line

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    model = load(args.run, device=args.device, dtype=getattr(torch, args.dtype) if args.dtype else None)
    relevance = (args.out or args.run / "chat") if args.relevance else None
    talk = Chat(model, write, max_new_tokens=args.max_new_tokens, relevance=relevance, name=args.run.name)
    if args.image is not None:
        talk.show(args.image)
    converse(talk, read_line, write)


def export(args: argparse.Namespace) -> None:
    """Writes a model to one folder for use elsewhere."""
    import torch

    from prism_deco.api import load
    from prism_deco.export import check_empty, save_llava
    from prism_deco.training.consolidate import consolidate

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.checkpoint:
        if args.hf or args.dtype:
            raise ValueError("--checkpoint writes a model folder as a run does: export that one with --hf or --dtype.")
        check_empty(args.to)
        consolidate(args.run, args.checkpoint, args.to)
    elif args.hf:
        # The two models are compared in the precision of training.
        model = load(args.run)
        save_llava(args.to, model.config, model.vlm, model.llm, dtype=dtype)
    else:
        load(args.run, dtype=dtype).save(args.to)
    log.info("The export is in %s", args.to)


def sweep(args: argparse.Namespace) -> int:
    """Runs the cells of a sweep that are not done; 1 where some still are not."""
    from rich.console import Console

    from prism_deco.sweep import Ledger, dry_run, parse, render, run

    spec = parse(args.arguments)
    if args.status:
        _print(render(Ledger.read(spec.folder)))
        return 0
    if args.dry_run:
        sys.stdout.write(dry_run(spec, jobs=args.jobs))  # unwrapped: to be copied
        return 0
    console = Console()
    try:
        done = run(spec, jobs=args.jobs, timeout=args.timeout * 60 or None, console=console)
    finally:
        if not console.is_terminal and (spec.folder / "ledger.json").exists():
            _print(render(Ledger.read(spec.folder)))
    log.info("The sweep is in %s; the same command goes on with what is not done", spec.folder)
    return 0 if done else 1


def plan(args: argparse.Namespace) -> None:
    """Says what the cells of a sweep, or one run, will take."""
    from prism_deco.plan import as_json, plan_run, table
    from prism_deco.stages import split
    from prism_deco.sweep import expand, parse
    from prism_deco.sweep.spec import split_values

    if any("=" not in text or len(split_values(text.partition("=")[2])) > 1 for text in args.arguments):
        configs = {cell.id: cell.config for cell in expand(parse(args.arguments))}
    else:
        stages = {stage.name: stage.config for stage in split(args.arguments)}
        configs = stages or {"": load_config(args.arguments)}
    plans = [
        plan_run(config, name, accelerator_name=args.accelerator, mfu=args.mfu) for name, config in configs.items()
    ]
    if args.json:
        args.json.write_text(json.dumps(as_json(plans), indent=2) + "\n", encoding="utf-8")
    _print(table(plans, args.mfu))


def data_check(args: argparse.Namespace) -> int:
    """Walks a data set; 1 where there are faults."""
    config = load_config(args.arguments)
    from prism_deco.compose import group, max_positions, prompt_options
    from prism_deco.data import build_source
    from prism_deco.data.check import check
    from prism_deco.data.examples import Encoder
    from prism_deco.llms import build_llm

    llm = build_llm(group(config, "llm"), pretrained=False, device="meta", **prompt_options(config))
    encoder = Encoder(
        llm,
        max_text_tokens=config.recipe.max_text_tokens,
        max_positions=max_positions(config, llm),
        tokens_per_image=config.projector.num_tokens or config.recipe.num_tokens,
    )
    out = args.out or Path(config.runs_dir) / "data_check" / config.data.name
    report = check(build_source(group(config, "data")), encoder, out, workers=args.workers, allow=args.allow)
    _print(report.render())
    return report.exit_status


def data_prepare(args: argparse.Namespace) -> None:
    """Downloads and lays out a published data set."""
    from prism_deco.data.prepare import plan, prepare, read_dataset

    dataset = read_dataset(args.name)
    _print(plan(dataset, args.root).render())
    if not args.plan:
        prepare(dataset, args.root)


def report(args: argparse.Namespace) -> None:
    """Writes the report of a sweep or of runs."""
    from prism_deco.report.layout import terminal
    from prism_deco.report.write import write_report

    page, scores = write_report(args.folders, args.out, split=args.split, mixed=args.mixed)
    for table in scores:
        _print(terminal(table))
    log.info("Open %s in a browser", page)


def record_blind(args: argparse.Namespace) -> None:
    """Keeps a blind run's scores as the reference."""
    from prism_deco.report.blind import REFERENCE, record

    record(args.run, args.out or REFERENCE)


def pretrain_mini(args: argparse.Namespace) -> None:
    """Makes the miniature's towers and tokenizers."""
    from prism_deco.data.shapes import corpus
    from prism_deco.llms.train_tokenizer import train_tokenizers
    from prism_deco.pretraining import pretrain_tower
    from prism_deco.registry import unknown

    for name in args.names:
        if name not in MINIATURE_PARTS:
            raise unknown("part of the miniature", name, MINIATURE_PARTS)
    for name in args.names or MINIATURE_PARTS:
        if name == "tokenizers":
            train_tokenizers(corpus(args.seed, TOKENIZER_TEXTS), args.out / "tokenizers")
        else:
            pretrain_tower(name, args.out / "towers", args.seed)


def bench_projectors(args: argparse.Namespace) -> None:
    """Compares the projectors."""
    from prism_deco.bench.projectors import Sizes, bench_projectors, render

    sizes = Sizes(args.in_dim, args.out_dim, tuple(args.in_grid), args.num_tokens, args.batch_size)
    rows = bench_projectors(args.names, sizes, dtypes=args.dtypes, device=args.device, repeats=args.repeats)
    _print(render(rows, sizes, args.device))


def bench_train(args: argparse.Namespace) -> None:
    """Compares our training step with that of transformers' own LLaVA."""
    from prism_deco.bench.presets import PRESETS

    config = load_config([*PRESETS[args.preset], *args.arguments])
    import torch

    from prism_deco.bench.train import bench_train
    from prism_deco.bench.train_report import render

    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    sizes = {"batch_size": args.batch_size, "steps": args.steps, "rounds": args.rounds}
    report = bench_train(config, device=args.device, ablation=args.ablation, **sizes)
    _print(render(report))
    if args.out:
        report.write(args.out)


def bench_data(args: argparse.Namespace) -> None:
    """Compares the input pipeline with a plain one."""
    config = load_config(args.arguments)
    import tempfile

    from prism_deco.backbones import build_backbone
    from prism_deco.bench.data import bench_data, photographs, render
    from prism_deco.compose import group
    from prism_deco.llms import build_llm

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
