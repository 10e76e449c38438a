"""Scores a finished run, for `prism-deco evaluate` and after the training of `prism-deco train`."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.commands.common import own_benchmarks, show
from prism_deco.config import load_choice, read_config
from prism_deco.config.choices import TOKENS, resolve_benchmarks, results_name
from prism_deco.errors import UsageError
from prism_deco.files import check_folder, check_writable, read_json, read_result, write_json

if TYPE_CHECKING:  # these need torch
    from prism_deco.api import Model
    from prism_deco.distributed import World
    from prism_deco.evaluation import Benchmark

log = logging.getLogger(__name__)

FILE = "predictions.jsonl"


@dataclass(frozen=True)
class Tokens:
    """The visual tokens that a trained model is scored with, if they differ from training.

    Attributes:
        num_tokens: per image; None is as in training.
        compressor: reduces the tokens of a `linear` run to that number; None leaves it to the projector (`matryoshka`).
        options: of the compressor.
    """

    num_tokens: int | None = None
    compressor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The subfolder of `eval` for their results; empty for those of the training's own tokens."""
        if self.num_tokens is None:
            return ""
        options = [f"{key}{value}" for key, value in self.options.items()]
        return "-".join([f"{self.compressor or 'tokens'}{self.num_tokens}", *options])

    def check(self, config: DictConfig) -> None:
        """Raises `UsageError` if a model of that configuration cannot be scored with these tokens."""
        from prism_deco.build import build_model
        from prism_deco.evaluation.compressors import compress

        vlm, _ = build_model(config, device="meta")
        if self.compressor is not None and self.num_tokens is not None:
            # Tried on a model without weights: it refuses what does not fit.
            compress(vlm, self.compressor, self.num_tokens, **self.options)
            return
        if self.num_tokens not in vlm.projector.scales:
            trained = " and ".join(map(str, vlm.projector.scales))
            log.warning("num_tokens=%s: the run was trained with %s visual tokens", self.num_tokens, trained)
        chosen = config.copy()
        chosen.projector.num_tokens = self.num_tokens
        other = build_model(chosen, device="meta")[0].projector.state_dict()
        # If the weights have the same shapes for both numbers, they can be loaded for the other one.
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in vlm.projector.state_dict().items()}:
            raise UsageError(
                f"num_tokens={self.num_tokens}: the weights of projector={config.projector.name} depend on the number "
                "of visual tokens; those of matryoshka do not."
            )

    def load(self, run: Path) -> Model:
        """The model of a run, set to these tokens."""
        from prism_deco.api import load
        from prism_deco.evaluation.compressors import compress

        if self.compressor is None:
            return load(run, num_tokens=self.num_tokens)
        model = load(run)
        assert self.num_tokens is not None
        compress(model.vlm, self.compressor, self.num_tokens, **self.options)
        return model


def score_run(
    folder: Path,
    names: str | Sequence[str],
    options: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
    *,
    world: World,
    asks: Sequence[str],
    batch_size: int,
    tokens: Tokens,
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Scores a run on benchmarks and prints the scores beside chance and, if known, the blind score.

    All inputs are checked before the model is loaded.

    Args:
        names: of benchmarks and groups.
        options: keys to replace in all their YAMLs (split, limit, root); None keeps a YAML's value.
        own: keys to replace in single YAMLs, by the benchmark's name.
        world: the processes that share the images; all of them call this function.
        asks: ways to ask, see `evaluate.ask`; each has its own results.
        batch_size: questions per generation.
        tokens: visual tokens to score with.
        out: folder of the results; None is the run's `eval`, or a subfolder for other tokens (`Tokens.folder`).
        device: cpu | cuda, which must be available; None is what the run was trained on, or the CPU.
        dtype: float32 | bfloat16; None is bfloat16 after training in `bf16-mixed`, else that of the weights.
    """
    manifest = finished_run(folder)
    # The training's own number without a compressor is no change: its results belong in `eval` itself.
    if tokens.num_tokens is not None and tokens == Tokens(manifest["tokens"]["visual_out"]):
        tokens = Tokens()
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
    # By results folder: how to ask, and what.
    todo: dict[Path, tuple[str, Benchmark]] = {}
    for ask in asks:
        check_ask(spec, ask)
        for name, benchmark in zip(names, benchmarks, strict=True):
            todo[results_root / results_name(name, benchmark.split, ask)] = ask, benchmark
    for results_folder in todo:
        check_writable(results_folder, "Name a folder for the results with --out.")
    model = tokens.load(folder)
    if dtype is None and model.config.trainer.precision == "bf16-mixed":
        dtype = "bfloat16"
    if dtype is not None:
        model.vlm.cast(getattr(torch, dtype))
    model.vlm.to(chosen or local_device(model.config.trainer.accelerator))
    computed_in = str(next(model.vlm.lm.parameters()).dtype).removeprefix("torch.")
    model_id = " ".join(filter(None, [manifest["model_sha256"], tokens.folder]))
    about = {"batch_size": batch_size, "model_id": model_id, "dtype": computed_in}
    # Read before they are replaced: only scores that change are logged below.
    known = {results_folder: _score(results_folder) for results_folder in todo}
    results = []
    constant = {}
    for results_folder, (ask, benchmark) in todo.items():
        model.ask = ask
        results.append(evaluate(model, benchmark, results_folder, **about, ask=ask, world=world))
        if world.is_main:
            constant[benchmark.name] = chance(benchmark, load_predictions(results_folder / FILE))
    # All ranks answered questions; one prints and writes the rest.
    if not world.is_main:
        return
    write_json(results_root / TOKENS, asdict(tokens) | {"first_token_seconds": _first_token_seconds(model)})
    if out is None:  # only new scores: logging one twice would draw it twice
        scores = {str(f.relative_to(folder)): _score(f) for f in todo if _score(f) != known[f]}
        _log_scores(folder, model.config, scores, manifest["steps"])
    show(table(results, constant, blind_scores(model.config, benchmarks)))


def _first_token_seconds(model: Model) -> float:
    """Time from an image and a short question to the first token of the answer: image transform, tower, projector, and
    the LLM's prefill. The shortest of five, since other load on the machine only adds to it."""
    from PIL import Image

    side = model.vlm.backbone.image_size
    image = Image.new("RGB", (side, side))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        model.generate(image, "What is in the image?", max_new_tokens=1)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one is a warm-up


def _score(results_folder: Path) -> float | None:
    """The primary metric in a results folder; None if it has none yet."""
    path = results_folder / "metrics.json"
    if not path.is_file():
        return None
    content = read_result(path, hint="Remove it, and run the same command again.")
    return content["metrics"][content["primary"]]


def _log_scores(run: Path, config: DictConfig, scores: Mapping[str, Any], step: int) -> None:
    """Adds scores to the loggers of a run's training, if they are installed here."""
    from prism_deco.training.board import Loggers

    if not scores:
        return
    try:
        loggers = Loggers(run, config, step)
    except UsageError as error:
        log.warning("The scores are not logged: %s", error)
        return
    loggers.scalars(scores, step)
    loggers.close("success")


def blind_scores(config: DictConfig, benchmarks: Iterable[Benchmark]) -> dict[str, float]:
    """Recorded scores by benchmark of a model trained with these settings but without images. They are known for the
    first variant of a benchmark's YAML."""
    from prism_deco.report import baselines

    found = {}
    for benchmark in benchmarks:
        scores = baselines.blind_scores(config, benchmark.split or "own") or {}
        if benchmark.name not in scores:
            continue
        recorded = load_choice("benchmark", benchmark.name).get("variants") or benchmark.variants
        if recorded[0] == benchmark.variants[0]:
            found[benchmark.name] = scores[benchmark.name]
    return found


def finished_run(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        UsageError: it is no finished run. An export is none, as it lacks its training data and the hash of its weights.
    """
    check_folder(folder)
    path = folder / "manifest.json"
    if path.is_file():
        from prism_deco.config.registry import require_imported

        config = folder / "model" / "config.yaml"
        require_imported(read_config(config).plugins, config)
        return read_json(path)
    if (folder / "backbone.json").is_file():  # every model folder has one
        raise UsageError(
            f"{folder} is a model folder or an export, not a run folder: benchmarks need the run that it came from, "
            "such as runs/RUN_ID. `prism-deco chat` and `explain --image` take exports."
        )
    raise UsageError(f"{folder} holds no finished run: it has no manifest.json.")


def stored_keys(run: Path, name: str, leave_out: Container[str] = ()) -> dict[str, Any]:
    """The keys of a benchmark in a run's configuration (`benchmark.NAME.KEY`), such as the root of its files."""
    stored: Any = OmegaConf.to_container(read_config(run / "config.yaml").benchmark)
    return {key: value for key, value in stored.get(name, {}).items() if key not in leave_out}
