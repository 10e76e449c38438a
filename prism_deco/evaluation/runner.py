"""Asks a model a benchmark's questions. Each image is encoded once, and answers are saved batch by batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from prism_deco.config.schema import AS_TRAINED
from prism_deco.distributed import World
from prism_deco.evaluation.base import Benchmark, Model
from prism_deco.evaluation.image_check import bad_images
from prism_deco.evaluation.items import Item, Prediction
from prism_deco.evaluation.predictions import ASK, VARIANTS, PredictionStore
from prism_deco.evaluation.scoring import predict, summarise
from prism_deco.files import write_json

log = logging.getLogger(__name__)


def evaluate(
    model: Model,
    benchmark: Benchmark,
    out_dir: str | Path,
    *,
    batch_size: int = 16,
    image_cache: int = 128,
    model_id: str | None = None,
    dtype: str | None = None,
    ask: str = AS_TRAINED,
    progress: bool = True,
    world: World | None = None,
) -> dict[str, Any]:
    """Answers and scores a benchmark; writes `predictions.jsonl` and `metrics.json` into `out_dir`.

    A resumed evaluation ends with the same `predictions.jsonl` as an uninterrupted one. In low precision, an answer can
    depend on the other questions of its batch, so batches do not depend on what is done, and a batch with a missing
    answer is asked again as a whole.

    Args:
        batch_size: questions per generation, and images per encoding.
        image_cache: number of images whose visual tokens are in memory at a time.
        model_id: identifies the model (a hash of the weights, say); a folder never mixes answers of two models.
        dtype: what the model computes in; recorded, and never mixed either.
        ask: how the model is prompted (`LanguageModel.ask`); recorded, and never mixed either.
        world: the processes that share the images, all of which call this and see `out_dir`; None is this one alone.

    Returns:
        The content of `metrics.json` (see `summarise`).

    Raises:
        UsageError: before any question is asked, for damaged files, bad images, or a folder with other answers.
    """
    out_dir = Path(out_dir)
    world = world or World()
    items = benchmark.items()
    decoding = {"strategy": "greedy", "max_new_tokens": benchmark.max_new_tokens, "dtype": dtype, "model": model_id}
    if ask != AS_TRAINED:
        decoding[ASK] = ask
    store = PredictionStore(out_dir, items, decoding | {VARIANTS: list(benchmark.variants)}, world.rank, world.size)
    world.barrier()  # no rank writes before all have read the existing answers
    if world.is_main:
        _log_questions(benchmark, items, len(store.done))
    # This rank's items, in windows of batches. Both follow from the questions alone, not from what is answered.
    mine = _shard(items, world.rank, world.size)
    windows = _windows(mine, batch_size, image_cache)
    unfinished = [window for window in windows if not all(store.has_all(batch) for batch in window)]
    bad = bad_images([item for window in unfinished for batch in window for item in batch], benchmark.on_bad_image)
    world.barrier()  # no rank generates before all have checked their images
    # Bad images leave the batches after these are formed, so that all other batches stay as they are.
    unfinished = [[_without(batch, bad) for batch in window] for window in unfinished]
    todo = [batch for window in unfinished for batch in window if not store.has_all(batch)]
    # A batch with a missing answer is asked again as a whole: the answers that it already has are dropped.
    asked_again = {item.question_id for batch in todo for item in batch}
    store.start({item.question_id for item in mine} - asked_again)
    # Their predictions have no output, and count as wrong.
    unanswerable = [item for item in mine if bad.intersection(item.images) and not store.has_all([item])]
    store.append(benchmark.grade(predict(item, None)) for item in unanswerable)
    with _bar(enabled=progress and world.is_main) as bar:
        task = bar.add_task(benchmark.name, total=len(mine), completed=len(mine) - sum(map(len, todo)))
        for window in unfinished:
            for predictions in _answer_window(model, benchmark, window, store, batch_size):
                store.append(predictions)
                bar.advance(task, len(predictions))
    world.barrier()
    if world.is_main:
        predictions = store.merge()
        if missing := sum(prediction.output is None for prediction in predictions):
            log.warning(
                "%s: %d of %d answers are missing and count as wrong: their image is missing or unreadable",
                *(benchmark.name, missing, len(predictions)),
            )
        write_json(out_dir / "metrics.json", summarise(benchmark, predictions, decoding))
    world.barrier()
    return json.loads((out_dir / "metrics.json").read_text(encoding="utf-8"))


def _log_questions(benchmark: Benchmark, items: Sequence[Item], done: int) -> None:
    questions = f"{len(items) // len(benchmark.variants)} questions"
    if len(benchmark.variants) > 1:
        questions += f" in {len(benchmark.variants)} variants ({', '.join(benchmark.variants)})"
    log.info("%s: %s, %d of %d answers already there", benchmark.name, questions, done, len(items))


def _shard(items: Sequence[Item], rank: int, world: int) -> list[Item]:
    """The rank's items, ordered by image: those of every world-th image, so that only one rank encodes it."""
    by_images = _by_images(items)
    return [item for images in list(by_images)[rank::world] for item in by_images[images]]


def _by_images(items: Sequence[Item]) -> dict[tuple[str, ...], list[Item]]:
    """Groups items by their images; a text-only item is its own group."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.images or ("", item.question_id), []).append(item)
    return groups


def _windows(items: Sequence[Item], batch_size: int, image_cache: int) -> list[list[list[Item]]]:
    """Splits items into windows of at most `image_cache` images, and each window into batches (see `_batches`)."""
    windows: list[list[Item]] = [[]]
    held: set[str] = set()
    for members in _by_images(items).values():
        images = members[0].images
        if windows[-1] and len(held.union(images)) > image_cache:
            windows.append([])
            held = set()
        windows[-1] += members
        held.update(images)
    return [_batches(window, batch_size) for window in windows]


def _batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Batches of items with the same choices and prompts of similar length, longest first."""
    batches = []
    # The distinct choices, in order of appearance.
    for choices in dict.fromkeys(item.choices for item in items):
        alike = [item for item in items if item.choices == choices]
        alike.sort(key=lambda item: len(item.prompt), reverse=True)
        batches += [alike[k : k + batch_size] for k in range(0, len(alike), batch_size)]
    return batches


def _without(batch: Sequence[Item], bad: set[str]) -> list[Item]:
    return [item for item in batch if not bad.intersection(item.images)]


def _answer_window(
    model: Model, benchmark: Benchmark, window: Sequence[Sequence[Item]], store: PredictionStore, batch_size: int
) -> Iterator[list[Prediction]]:
    """Yields the graded predictions of the batches that are not done.

    Images are always encoded in the same groups, whatever is done; a group is skipped if none of it is needed.
    """
    batches = [batch for batch in window if not store.has_all(batch)]
    needed = {name for batch in batches for item in batch for name in item.images}
    paths: dict[str, Path] = {}
    for batch in window:
        for item in batch:
            paths |= zip(item.images, item.paths, strict=True)
    # All images of the window, in order of first use, whether or not they are needed now.
    names = list(paths)
    tokens: dict[str, Tensor] = {}
    for k in range(0, len(names), batch_size):
        group = names[k : k + batch_size]
        if needed.intersection(group):
            tokens |= zip(group, model.encode_images([paths[name] for name in group]), strict=True)
    for batch in batches:
        outputs = _ask(model, tokens, batch, benchmark.max_new_tokens)
        yield [benchmark.grade(predict(item, output)) for item, output in zip(batch, outputs, strict=True)]


def _ask(model: Model, tokens: Mapping[str, Tensor], batch: Sequence[Item], max_new_tokens: int) -> list[str]:
    """The outputs of a batch, asked in halves if it does not fit in GPU memory.

    Later batches keep their size: which come later differs in a resumed evaluation.

    Args:
        tokens: visual tokens float[M, E] of each image.
    """
    try:
        return _generate(model, tokens, batch, max_new_tokens)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Outside of `except`, since the exception keeps the tensors of the failed batch alive.
    torch.cuda.empty_cache()
    half = len(batch) // 2
    log.warning("Out of memory with %d questions at a time: continuing with %d", len(batch), half)
    first, second = batch[:half], batch[half:]
    return _ask(model, tokens, first, max_new_tokens) + _ask(model, tokens, second, max_new_tokens)


def _generate(model: Model, tokens: Mapping[str, Tensor], batch: Sequence[Item], max_new_tokens: int) -> list[str]:
    images: list[Any] = []
    for item in batch:
        own = [tokens[name] for name in item.images]
        images.append(own[0] if len(own) == 1 else own)
    prompts = [item.prompt for item in batch]
    choices = list(batch[0].choices)
    if not choices:
        return model.generate(images, prompts, max_new_tokens=max_new_tokens)
    rows = model.choice_probabilities(images, prompts, choices).tolist()
    return [json.dumps(dict(zip(choices, row, strict=True))) for row in rows]


def _bar(enabled: bool) -> Progress:
    name, unit = TextColumn("{task.description}", markup=False), TextColumn("answers")
    return Progress(name, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn(), disable=not enabled)
