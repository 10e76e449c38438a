"""`prism-deco evaluate`: scores of a run on benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.commands.common import Asked, asked_of, import_named_plugins, own_benchmarks, show
from prism_deco.config import load_choice, parse_value, read_config
from prism_deco.config.choices import (
    benchmark_name,
    choices,
    group_keys,
    resolve_asks,
    resolve_benchmarks,
    results_name,
)
from prism_deco.config.schema import AS_TRAINED
from prism_deco.errors import UsageError
from prism_deco.files import check_folder, check_writable, read_json, write_json

if TYPE_CHECKING:  # these need torch
    from prism_deco.api import Model
    from prism_deco.distributed import World
    from prism_deco.evaluation import Benchmark

log = logging.getLogger(__name__)

KEYS = ("ask", "batch_size", "compressor", "num_tokens", "plugins")
FILE = "predictions.jsonl"
TOKENS_FILE = "tokens.json"
"""Beside the results of a run: how many visual tokens they were made with, and what a first token takes."""


@dataclass(frozen=True)
class Tokens:
    """The visual tokens that a trained model is scored with, if others than in training.

    Attributes:
        num_tokens: of an image; None: as in training.
        compressor: what makes them of a `linear` run's; None: the projector itself (`matryoshka`).
        options: the compressor's own.
    """

    num_tokens: int | None = None
    compressor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of the folder that holds their results within the run's; empty: the run's own."""
        if self.num_tokens is None:
            return ""
        options = [f"{key}{value}" for key, value in self.options.items()]
        return "-".join([f"{self.compressor or 'tokens'}{self.num_tokens}", *options])

    def check(self, config: DictConfig) -> None:
        """`UsageError` where a model of that configuration, trained or not, cannot be asked with these tokens."""
        from prism_deco.build import build_model
        from prism_deco.evaluation.compressors import compress

        vlm, _ = build_model(config, device="meta")
        if self.compressor is not None and self.num_tokens is not None:
            compress(vlm, self.compressor, self.num_tokens, **self.options)
            return
        chosen = config.copy()
        chosen.projector.num_tokens = self.num_tokens
        other = build_model(chosen, device="meta")[0].projector.state_dict()
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in vlm.projector.state_dict().items()}:
            raise UsageError(
                f"num_tokens={self.num_tokens}: the weights of projector={config.projector.name} depend on the number "
                "of visual tokens; those of matryoshka do not."
            )

    def load(self, run: Path) -> Model:
        """The model of a run with these tokens."""
        from prism_deco.api import load
        from prism_deco.evaluation.compressors import compress

        if self.compressor is None:
            return load(run, num_tokens=self.num_tokens)
        model = load(run)
        assert self.num_tokens is not None
        compress(model.vlm, self.compressor, self.num_tokens, **self.options)
        return model


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evaluate`."""
    parser.add_argument("--score-only", type=Path, metavar="FILE", help="score this predictions.jsonl, load no model")
    # argparse cannot tell an optional run folder from the first option; the equals sign can.
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RUN KEY=VALUE",
        help="run folder; benchmark=NAMES (default: the run's) split=S limit=N ask=NAMES batch_size=N "
        "num_tokens=N compressor=fastv|visionzip|prumerge compressor.KEY=VALUE benchmark.NAME.root=DIR "
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
        raise UsageError("Name the one run to score, for example: prism-deco evaluate runs/RUN_ID benchmark=mini")
    (run,) = asked.runs
    if args.lmms_eval:
        _score_elsewhere(run, args, asked)
        return
    finished_run(run)
    names = asked.benchmarks or _trained_with(run)
    check_keys(names, asked.options, asked.own, also=also)
    own = {}
    of_groups = group_keys(names)
    for name in map(benchmark_name, resolve_benchmarks(names)):
        usual = of_groups.get(name, {}) | stored_keys(run, name)
        usual = {key: value for key, value in usual.items() if key not in asked.options}
        own[name] = usual | asked.own.get(name, {})
    more = {
        "tokens": _tokens_of(asked.others),
        "batch_size": _batch_size(asked),
        "out": args.out,
        "device": args.device,
        "dtype": args.dtype,
    }
    from prism_deco.distributed import World

    world = World.of_torchrun()
    with world.joined():
        asks = resolve_asks(asked.others.get("ask", AS_TRAINED))
        score_run(run, names, asked.options, own, world=world, asks=asks, **more)


def _batch_size(asked: Asked) -> int:
    batch_size = parse_value("batch_size", asked.others.get("batch_size", "64"))
    if type(batch_size) is not int or batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be a whole number above 0.")
    return batch_size


def _score_elsewhere(run: Path, args: argparse.Namespace, asked: Asked) -> None:
    """Scores a run by lmms-eval and prints the scores."""
    unused = [*asked.own, *({*asked.options, *asked.others} - {"limit", "batch_size", "plugins"})]
    if asked.benchmarks or unused:
        raise UsageError(
            f"--lmms-eval asks tasks of its own: leave out {', '.join(unused or ['benchmark='])}. Of the settings, it "
            "takes limit=N, batch_size=N and plugins=[MODULE]."
        )
    if importlib.util.find_spec("lmms_eval") is None:
        raise UsageError('lmms-eval is not installed: pip install "prism-deco[lmms-eval]"')
    tasks = [task.strip() for task in args.lmms_eval.split(",")]
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

    settings = {"batch_size": _batch_size(asked), "device": args.device, "dtype": args.dtype}
    limit = parse_value("limit", asked.options.get("limit", "null"))
    show(table(score_tasks(run, tasks, out, model_id=manifest["model_sha256"], limit=limit, **settings)))


def _tokens_of(given: Mapping[str, str]) -> Tokens:
    """What the keys `num_tokens`, `compressor` and `compressor.KEY` say."""
    num_tokens = parse_value("num_tokens", given.get("num_tokens", "null"))
    if num_tokens is not None and (type(num_tokens) is not int or num_tokens < 1):
        raise UsageError(f"num_tokens={num_tokens} must be a whole number above 0.")
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
    """Prints what a predictions file scores, beside chance and, where the file lies in a run, blindness."""
    from prism_deco.evaluation import build_benchmark, chance, load_predictions, score_file, table

    if asked.benchmarks is None:
        raise UsageError("Name the benchmark of the predictions, for example: benchmark=pope")
    keys = asked.options | next(iter(asked.own.values()), {})
    benchmark = build_benchmark(asked.benchmarks, **keys)
    result = score_file(path, benchmark, chosen="variants" in keys)
    name, folder = benchmark.name, path.absolute().parent  # eval/<benchmark> or eval/<benchmark>-<split> of a run
    config = folder.parents[1] / "config.yaml"
    blind = {}
    if config.is_file():
        benchmark.split = folder.name.removeprefix(name).removeprefix("-") or benchmark.split
        blind = _blind(read_config(config), [benchmark])
    show(table([result], {name: chance(benchmark, load_predictions(path))}, blind))


def score_run(
    folder: Path,
    names: str | Sequence[str],
    options: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    world: World,
    asks: Sequence[str] = (AS_TRAINED,),
    batch_size: int = 64,
    tokens: Tokens = Tokens(),
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Scores a run on benchmarks and prints them beside chance and, where it is known, blindness.

    Everything that can be wrong with what is asked is found before the model is loaded.

    Args:
        names: of benchmarks and groups.
        options: keys of all their YAMLs to replace (split, limit, root); None keeps what a YAML says.
        own: keys of single YAMLs, by the benchmark's name.
        world: the processes that share the images, all of which call this.
        asks: how to ask, see `evaluate.ask`; each has results of its own.
        batch_size: questions per generation.
        tokens: visual tokens, if others than in training.
        out: folder of the results; None is the run's `eval`, or in it a folder for other tokens (`Tokens.folder`).
        device: cpu | cuda, which must be there; None is what the run was trained on, or the CPU.
        dtype: float32 | bfloat16; None is bfloat16 after training in `bf16-mixed`, else that of the weights.
    """
    manifest = finished_run(folder)
    import torch

    from prism_deco.build import group
    from prism_deco.distributed import local_device, requested_device
    from prism_deco.evaluation import chance, evaluate, load_predictions, table
    from prism_deco.evaluation.choose import prepare
    from prism_deco.llms.spec import check_ask, read_spec

    chosen = requested_device(device) if device else None
    names = resolve_benchmarks(names)
    benchmarks = prepare(names, options, own, root=own_benchmarks(folder))
    spec = read_spec(group(read_config(folder / "model" / "config.yaml"), "llm"))
    results_root = out or folder / "eval" / tokens.folder
    todo: dict[Path, tuple[str, Benchmark]] = {}
    for ask in asks:
        check_ask(spec, ask)
        for name, benchmark in zip(names, benchmarks, strict=True):
            todo[results_root / results_name(name, benchmark.split, ask)] = ask, benchmark
    for results_folder in todo:
        check_writable(results_folder, "Name a folder for the results with --out.")
    model = tokens.load(folder)
    if dtype := dtype or ("bfloat16" if model.config.trainer.precision == "bf16-mixed" else None):
        model.vlm.cast(getattr(torch, dtype))
    model.vlm.to(chosen or local_device(model.config.trainer.accelerator))
    computed_in = str(next(model.vlm.lm.parameters()).dtype).removeprefix("torch.")
    model_id = " ".join(filter(None, [manifest["model_sha256"], tokens.folder]))
    about = {"batch_size": batch_size, "model_id": model_id, "dtype": computed_in}
    known = {results_folder: _score(results_folder) for results_folder in todo}
    results, constant = [], {}
    for results_folder, (model.ask, benchmark) in todo.items():
        results.append(evaluate(model, benchmark, results_folder, **about, ask=model.ask, world=world))
        if world.is_main:
            constant[benchmark.name] = chance(benchmark, load_predictions(results_folder / FILE))
    if not world.is_main:
        return
    write_json(results_root / TOKENS_FILE, asdict(tokens) | {"first_token_seconds": _first_token_seconds(model)})
    if out is None:
        scores = {str(f.relative_to(folder)): _score(f) for f in todo if _score(f) != known[f]}
        _log_scores(folder, model.config, scores, manifest["steps"])
    show(table(results, constant, _blind(model.config, benchmarks)))


def _first_token_seconds(model: Model) -> float:
    """Median time from an image and a short question to the first token of the answer: image transform, tower,
    projector, and the LLM's pass over the prompt."""
    from PIL import Image

    side, times = model.vlm.backbone.image_size, []
    image = Image.new("RGB", (side, side))
    for _ in range(6):
        start = time.perf_counter()
        model.generate(image, "What is in the image?", max_new_tokens=1)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up


def _score(results_folder: Path) -> float | None:
    """The primary metric in a results folder; None where there is none yet."""
    path = results_folder / "metrics.json"
    if not path.is_file():
        return None
    content = read_json(path, ["metrics", "primary"], way_out="Remove it, and run the same command again.")
    return content["metrics"][content["primary"]]


def _log_scores(run: Path, config: DictConfig, scores: Mapping[str, Any], step: int) -> None:
    """Adds scores to the loggers of a run's training, where they are installed here."""
    from prism_deco.training.board import Loggers

    if scores:
        try:
            loggers = Loggers(run, config, step)
        except UsageError as error:
            log.warning("The scores are not logged: %s", error)
            return
        loggers.scalars(scores, step)
        loggers.close("success")


def _blind(config: DictConfig, benchmarks: Iterable[Benchmark]) -> dict[str, float]:
    """Recorded scores of a model trained with these settings but without images, by benchmark: where it is asked in the
    variant that was recorded, the first one of its YAML."""
    from prism_deco.report.baselines import blind_scores

    found = {}
    for benchmark in benchmarks:
        scores = blind_scores(config, benchmark.split or "own") or {}
        if benchmark.name not in scores:
            continue
        recorded = load_choice("benchmark", benchmark.name).get("variants") or benchmark.variants
        if recorded[0] == benchmark.variants[0]:
            found[benchmark.name] = scores[benchmark.name]
    return found


def finished_run(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        UsageError: the folder is none, such as an export, which knows neither its data nor the hash of its weights.
    """
    check_folder(folder)
    path = folder / "manifest.json"
    if path.is_file():
        from prism_deco.config.registry import require_imported

        config = folder / "model" / "config.yaml"
        require_imported(read_config(config).plugins, config)
        return read_json(path)
    if (folder / "backbone.json").is_file():  # beside the weights, in every model folder
        raise UsageError(
            f"{folder} is a model's folder or an export, no run folder: benchmarks need the run that it came from, "
            "such as runs/RUN_ID. `prism-deco chat` and `explain --image` take exports."
        )
    raise UsageError(f"{folder} holds no finished run: it has no manifest.json.")


def _trained_with(run: Path) -> str:
    benchmarks = read_config(run / "config.yaml").evaluate.benchmarks
    if not benchmarks:
        raise UsageError(f"{run} names no benchmarks of its own: choose some, for example benchmark=table3")
    return benchmarks


def stored_keys(run: Path, name: str, leave_out: Container[str] = ()) -> dict[str, Any]:
    """The keys of a benchmark that a run was trained with (`benchmark.NAME.KEY`): where its files lie, for example."""
    stored: Any = OmegaConf.to_container(read_config(run / "config.yaml").benchmark)
    return {key: value for key, value in stored.get(name, {}).items() if key not in leave_out}
