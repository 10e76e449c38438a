"""Compares the input pipeline with a plain PIL and torchvision loader on the same images, in one process."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from torchvision.transforms import v2

from prism_deco.config import cache_dir
from prism_deco.data.base import Source
from prism_deco.data.encoder import Encoder
from prism_deco.data.examples import Examples, Transform
from prism_deco.data.images import FORMATS, ImageFolder, decode_image
from prism_deco.data.loader import Collate, stack_pixels
from prism_deco.data.records import open_records
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineRow:
    """One pipeline's throughput."""

    pipeline: str
    """What it does."""
    images_per_second: float
    """On one core: median of the repeats."""
    spread: float
    """Interquartile range of that."""


def bench_data(
    source: Source,
    llm: LanguageModel,
    transform: Transform,
    *,
    side: int,
    images: int = 64,
    micro_batch_size: int = 16,
    repeats: int = 5,
) -> list[PipelineRow]:
    """Measures images per second on one core (torch limited to one thread) in steps of one micro-batch.

    Repeats are interleaved, so that a machine that slows down meanwhile slows both pipelines. All
    files are read once before, so that what counts is the work and not the disk.

    Args:
        transform: the backbone's, one or more towers.
        side: side in pixels that the plain loader resizes to.
        images: how many of the first records with one image each are read.

    Raises:
        UsageError: no record has an image, images that are no files, or too few repeats.
    """
    if repeats < 2:
        raise UsageError(f"repeats={repeats} shows no spread: use 2 or more.")
    records = open_records(source.train, cache_dir(), image_root=source.image_root)
    folder = source.images(records)
    if not isinstance(folder, ImageFolder):
        raise UsageError("The plain loader reads image files: choose a data set whose images are files.")
    chosen = [i for i in np.flatnonzero(records.has_image).tolist() if len(records[i].images) == 1][:images]
    if not chosen:
        raise UsageError(f"{source.train} has no record with an image.")
    examples = Examples(records, folder, Encoder(llm, max_text_tokens=2048), transform)
    collate = Collate(tokens_per_image=144, micro_batch_size=micro_batch_size)
    files = [folder.root / records[i].images[0] for i in chosen]
    plain = _plain_transform(side)
    blocks = [slice(i, i + micro_batch_size) for i in range(0, len(chosen), micro_batch_size)]
    pipelines: dict[str, Callable[[slice], Any]] = {
        "prism_deco: whole examples": lambda block: collate([examples[i] for i in chosen[block]]),
        "prism_deco: images alone": lambda block: stack_pixels([transform(_open(file)) for file in files[block]]),
        "prism_deco: images alone, data.draft_jpeg": lambda block: stack_pixels(
            [transform(decode_image(file.read_bytes(), str(file), least_side=2 * side)) for file in files[block]]
        ),
        "PIL and torchvision: images alone": lambda block: torch.stack([plain(_open(file)) for file in files[block]]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        log.info("Reading %d images in %d ways, %d times each", len(chosen), len(pipelines), repeats)
        for repeat in range(-1, repeats):
            for name, run in pipelines.items():
                start = time.process_time()
                for block in blocks:
                    run(block)
                if repeat >= 0:
                    seconds[name].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return [_row(name, len(chosen), values) for name, values in seconds.items()]


def render(rows: Sequence[PipelineRow], title: str) -> Table:
    """The rows as a table; the last is what the others are compared with."""
    caption = "Processor time, one thread; median ± interquartile range."
    table = Table(title=Text(title, "table.title"), caption=caption)
    table.add_column("pipeline")
    table.add_column("images/s per core", justify="right")
    table.add_column("relative", justify="right")
    for row in rows:
        relative = row.images_per_second / rows[-1].images_per_second
        table.add_row(row.pipeline, f"{row.images_per_second:.1f} ± {row.spread:.1f}", f"{relative:.2f}")
    return table


def photographs(folder: Path, count: int = 64, size: tuple[int, int] = (640, 480)) -> Source:
    """Writes JPEG files of COCO's usual size with as much detail as photographs, and conversations about them.

    Args:
        size: (width, height) in pixels.
    """
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        # Detail that fades with its frequency, as in photographs: noise of many sizes, summed.
        pixels = np.zeros((size[1], size[0], 3))
        for scale in (1, 2, 4, 8, 16, 32, 64):
            noise = rng.normal(size=(-(-size[1] // scale), -(-size[0] // scale), 3)) * scale**0.8
            pixels += noise.repeat(scale, 0).repeat(scale, 1)[: size[1], : size[0]]
        pixels = np.clip(128 + 4 * pixels, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg", quality=90)
        turns = ["<image>\nWhat is in the picture?", "Noise of many sizes.", "Nothing else?", "Nothing but noise."]
        conversation = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": conversation})
    (folder / "train.json").write_text(json.dumps(records))
    return Source(folder / "train.json", folder / "images")


def _open(file: Path) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        return image.convert("RGB")


def _plain_transform(side: int) -> Callable[[Image.Image], torch.Tensor]:
    return v2.Compose(
        [
            v2.Resize(side, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(side),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def _row(name: str, images: int, seconds: Sequence[float]) -> PipelineRow:
    lower, median, upper = statistics.quantiles([images / s for s in seconds], n=4, method="inclusive")
    return PipelineRow(name, median, upper - lower)
