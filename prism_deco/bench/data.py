"""Compares the input pipeline with a plain PIL and torchvision loader on the same images."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from prism_deco.bench.measure import Usage, usage
from prism_deco.bench.result import BenchResult, BenchRow, interleaved, spread
from prism_deco.config import cache_dir
from prism_deco.data.base import Source
from prism_deco.data.encoder import Encoder
from prism_deco.data.images import FORMATS, decode_image
from prism_deco.data.loader import Collate, Examples, Transform, stack_pixels
from prism_deco.data.records import open_records
from prism_deco.llms import LanguageModel

log = logging.getLogger(__name__)

CAPTION = "Processor time, one thread; median ± interquartile range."


def bench_data(
    folder: Path,
    llm: LanguageModel,
    transform: Transform,
    *,
    side: int,
    size: tuple[int, int] = (640, 480),
    title: str = "",
    count: int = 64,
    micro_batch_size: int = 16,
    repeats: int = 5,
) -> BenchResult:
    """Measures images per second on one core (torch limited to one thread), one micro-batch at a time.

    A warm-up round reads all files first, so the disk is not measured.

    Args:
        folder: new folder for the images.
        transform: the backbone's.
        side: side in pixels that the plain loader resizes to.
        size: (width, height) of the images in pixels.
        count: number of images.
    """
    source = photographs(folder, count, size)
    records = open_records(source.train, cache_dir(), image_root=source.image_root)
    examples = Examples(records, source.images(records), Encoder(llm, max_text_tokens=2048), transform)
    collate = Collate(tokens_per_image=144, micro_batch_size=micro_batch_size)
    files = [folder / "images" / f"{i}.jpg" for i in range(count)]
    plain = _plain_transform(side)
    pipelines: dict[str, Callable[[slice], Any]] = {
        "prism_deco: whole examples": lambda block: collate([examples[i] for i in range(count)[block]]),
        "prism_deco: images alone": lambda block: stack_pixels([transform(_open(file)) for file in files[block]]),
        "prism_deco: images alone, data.draft_jpeg": lambda block: stack_pixels(
            [transform(decode_image(file.read_bytes(), str(file), least_side=2 * side)) for file in files[block]]
        ),
        "PIL and torchvision: images alone": lambda block: torch.stack([plain(_open(file)) for file in files[block]]),
    }

    def timed(pipeline: Callable[[slice], Any]) -> Usage:
        with usage(torch.device("cpu")) as taken:
            for start in range(0, count, micro_batch_size):
                pipeline(slice(start, start + micro_batch_size))
        return taken

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        log.info("Reading %d images in %d ways, %d times each", count, len(pipelines), repeats)
        taken = interleaved({name: partial(timed, run) for name, run in pipelines.items()}, repeats=repeats)
    finally:
        torch.set_num_threads(threads)
    rows = [BenchRow(name, usages, {"images": count}) for name, usages in taken.items()]
    # The plain loader comes last in `pipelines`.
    plain_speed = statistics.median(_speeds(rows[-1]))
    columns = {
        "images/s per core": lambda row: spread(_speeds(row), 1),
        "relative": lambda row: f"{statistics.median(_speeds(row)) / plain_speed:.2f}",
    }
    return BenchResult(rows, title, CAPTION, columns)


def _speeds(row: BenchRow) -> list[float]:
    """Images per second of CPU time, for each repeat."""
    return [row.facts["images"] / seconds for seconds in row.times("cpu_seconds")]


def photographs(folder: Path, count: int, size: tuple[int, int]) -> Source:
    """Writes JPEG files with about as much detail as photographs, and conversations about them."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        # A sum of noise at many scales: as in photographs, amplitude falls with frequency.
        pixels = np.zeros((size[1], size[0], 3))
        for scale in (1, 2, 4, 8, 16, 32, 64):
            # Rounded up, so that the enlarged noise covers the image; the rest is cut off.
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
