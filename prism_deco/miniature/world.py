"""Builds the miniature world on disk: images, conversations and benchmarks."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from prism_deco.errors import UsageError
from prism_deco.miniature.benchmarks import Split
from prism_deco.miniature.conversations import Pool, records
from prism_deco.miniature.export import export_benchmarks, image_name, write_json
from prism_deco.miniature.render import render
from prism_deco.miniature.scene import Scene, draw_scene

log = logging.getLogger(__name__)

VERSION = 1
"""Goes up with every change of what is built, so that no old world passes for a new one."""


def build_world(
    root: Path,
    *,
    seed: int = 0,
    train_images: int = 8000,
    val_images: int = 400,
    test_images: int = 800,
    records_per_image: int = 2,
    val_items: int = 250,
    test_items: int = 500,
) -> Path:
    """Builds the world into the folder `root`, or finds it there.

    Args:
        seed: of the scenes and the questions; every number gives another world.
        train_images: images to converse about in `train.json`.
        val_images: images of `val.json` and of `benchmarks/val`.
        test_images: images of `benchmarks/test`.
        records_per_image: conversations about each image.
        val_items: questions per benchmark in `benchmarks/val` (fewer where images run out).
        test_items: the same in `benchmarks/test`.

    Returns:
        `root`. It appears only when it is complete; `world.json` in it holds the arguments and hashes of the content.

    Raises:
        UsageError: `root` holds something else.
    """
    images = {"train": train_images, "val": val_images, "test": test_images}
    items = {"val": val_items, "test": test_items}
    arguments = {"version": VERSION, "seed": seed, "images": images, "items": items, "records": records_per_image}
    if _is_built(root, arguments):
        return root
    log.info("Building the miniature world in %s", root)
    root.parent.mkdir(parents=True, exist_ok=True)
    # Beside the root, so that the last step is a rename within one file system.
    workplace = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        workplace.chmod(0o755)
        _build(workplace, seed, images, items, records_per_image, arguments)
        try:
            workplace.rename(root)
        except OSError:
            # Another process was faster.
            if not _is_built(root, arguments):
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return root


def _is_built(root: Path, arguments: Mapping[str, Any]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "world.json").read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{root} is not a miniature world: choose another folder, or remove this one.") from error
    if found != arguments:
        raise UsageError(
            f"{root} holds a miniature world of {found}, not of {arguments}: choose another folder, or remove this one."
        )
    return True


def _build(
    root: Path,
    seed: int,
    images: Mapping[str, int],
    items: Mapping[str, int],
    records_per_image: int,
    arguments: Mapping[str, Any],
) -> None:
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
                write_json(root / f"{split}.json", list(records(seed, split, named, records_per_image)))
            if split in items:
                asked = Split(seed, split, [Pool(scene) for scene in scenes], items[split])
                export_benchmarks(root / "benchmarks" / split, asked)
            progress.advance(task, count)
    files = sorted(path for path in root.rglob("*") if path.suffix in (".json", ".p"))
    hashes = {path.relative_to(root).as_posix(): _content_hash(path) for path in files}
    world = {"arguments": arguments, "pixels_sha256": pixels.hexdigest(), "sha256": hashes}
    (root / "world.json").write_text(json.dumps(world, indent=2) + "\n", encoding="utf-8")


def _save(scene: Scene, path: Path) -> bytes:
    """Writes an image; returns its pixels."""
    image = render(scene)
    # Strong compression would take longer than everything else.
    Image.fromarray(image).save(path, compress_level=1)
    return image.tobytes()


def _content_hash(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".p":
        # How a pickle shares equal strings is up to the Python version; this one was just written here.
        content = json.dumps(pickle.loads(content)).encode()
    return hashlib.sha256(content).hexdigest()
