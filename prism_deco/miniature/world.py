"""The miniature world as a data source: images, conversations and benchmarks, built in the cache on first use."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from prism_deco.config import building_folder, cache_dir
from prism_deco.data.base import SOURCES, Source
from prism_deco.errors import UsageError
from prism_deco.files import write_whole
from prism_deco.miniature.benchmarks import Split
from prism_deco.miniature.conversations import Pool, caption_records, records
from prism_deco.miniature.export import export_benchmarks, image_name, objects
from prism_deco.miniature.render import render
from prism_deco.miniature.scene import Scene, draw_scene

log = logging.getLogger(__name__)

_RECORD = "world.json"

VERSION = 2
"""Increases with every change of the content, which invalidates cached worlds."""


@SOURCES.register("shapes")
def shapes(**options: Any) -> Source:
    """The files of the world with these options (`build_world`), cached in a folder per set of options."""
    world = cache_dir() / f"shapes-{_key(options)}"
    build_world(world, **options)
    return Source(world / "train.json", world / "images", val=world / "val.json", benchmarks=world)


@SOURCES.register("shapes_captions")
def shapes_captions(**options: Any) -> Source:
    """The same world with one caption per image, for alignment."""
    source = shapes(**options)
    arguments = json.loads((source.train.parent / _RECORD).read_text(encoding="utf-8"))["arguments"]
    folder = cache_dir() / f"shapes-captions-{_key(options)}"
    files = {split: folder / f"{split}.json" for split in ("train", "val")}
    for split, path in files.items():
        if not path.is_file():
            count = arguments["images"][split]
            # Scenes are functions of seed, split and index: drawing them again gives those of the images.
            named = [(f"{split}/{image_name(i)}", draw_scene(arguments["seed"], split, i)) for i in range(count)]
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(list(caption_records(split, named))))
    return replace(source, train=files["train"], val=files["val"])


def _key(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([VERSION, options], sort_keys=True).encode()).hexdigest()[:12]


def build_world(
    root: Path,
    *,
    seed: int = 0,
    train_images: int = 10_000,
    val_images: int = 400,
    test_images: int = 800,
    records_per_image: int = 2,
    val_items: int = 250,
    test_items: int = 500,
) -> Path:
    """Builds the world in the folder `root` and returns it, or returns an existing one.

    The folder appears when it is complete; its `world.json` holds the arguments and hashes of the content.

    Args:
        seed: of the scenes and the questions.
        train_images: images of `train.json`.
        val_images: images of `val.json` and of `benchmarks/val`.
        test_images: images of `benchmarks/test`.
        records_per_image: conversations about each image.
        val_items: questions per benchmark in `benchmarks/val` (fewer if images run out).
        test_items: the same in `benchmarks/test`.
    """
    if (root / _RECORD).is_file():
        return root
    log.info("Building the miniature world in %s", root)
    building = building_folder(root)
    arguments = {
        "version": VERSION,
        "seed": seed,
        "images": {"train": train_images, "val": val_images, "test": test_images},
        "items": {"val": val_items, "test": test_items},
        "records": records_per_image,
    }
    try:
        _build(building, arguments)
        try:
            building.rename(root)
        except OSError as error:
            if not (root / _RECORD).is_file():  # otherwise another process was faster
                raise UsageError(f"{root} is not a miniature world: remove what is there.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def _build(root: Path, arguments: Mapping[str, Any]) -> None:
    seed, images, items = arguments["seed"], arguments["images"], arguments["items"]
    pixels = hashlib.sha256()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        # Questions take about as long as images.
        task = progress.add_task("Building the miniature world", total=2 * sum(images.values()))
        for split, count in images.items():
            scenes = [draw_scene(seed, split, index) for index in range(count)]
            folder = root / "images" / split
            folder.mkdir(parents=True)
            for index, scene in enumerate(scenes):
                pixels.update(_save(scene, folder / image_name(index)))
                progress.advance(task)
            if split != "test":
                named = [(f"{split}/{image_name(index)}", scene) for index, scene in enumerate(scenes)]
                conversations = list(records(seed, split, named, arguments["records"]))
                (root / f"{split}.json").write_text(json.dumps(conversations))
                labels = objects([path for path, _ in named], scenes)
                (root / f"{split}-objects.json").write_text(json.dumps(labels))
            if split in items:
                asked = Split(seed, split, [Pool(scene) for scene in scenes], items[split])
                export_benchmarks(root / "benchmarks" / split, asked)
            progress.advance(task, count)
    files = sorted(path for path in root.rglob("*") if path.suffix in (".json", ".p"))
    hashes = {path.relative_to(root).as_posix(): _content_hash(path) for path in files}
    world = {"arguments": arguments, "pixels_sha256": pixels.hexdigest(), "sha256": hashes}
    # Last, since this file marks a complete world.
    (root / _RECORD).write_text(json.dumps(world, indent=2) + "\n", encoding="utf-8")


def _save(scene: Scene, path: Path) -> bytes:
    """Writes an image; returns its pixels."""
    image = render(scene)
    # Strong compression would take longer than everything else.
    Image.fromarray(image).save(path, compress_level=1)
    return image.tobytes()


def _content_hash(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".p":
        # Python versions pickle equal strings differently. Unpickling is safe here: the file was just written.
        content = json.dumps(pickle.loads(content)).encode()
    return hashlib.sha256(content).hexdigest()
