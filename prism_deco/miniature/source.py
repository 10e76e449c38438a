"""The miniature world as a data source: built into the cache on first use."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_deco.config import cache_dir
from prism_deco.data.base import SOURCES, Source
from prism_deco.miniature.conversations import caption_records
from prism_deco.miniature.export import image_name, write_json
from prism_deco.miniature.scene import draw_scene
from prism_deco.miniature.world import VERSION, build_world


@SOURCES.register("shapes")
def shapes(**options: Any) -> Source:
    """The files of the world with these options (`build_world`), one cached folder for each set of them."""
    world = cache_dir() / f"shapes-{_key(options)}"
    build_world(world, **options)
    return Source(world / "train.json", world / "images", val=world / "val.json", benchmarks=world)


@SOURCES.register("shapes_captions")
def shapes_captions(**options: Any) -> Source:
    """The same world, but of each image its caption only: pairs to align a projector on."""
    source = shapes(**options)
    arguments = json.loads((source.train.parent / "world.json").read_text(encoding="utf-8"))["arguments"]
    folder = cache_dir() / f"shapes-captions-{_key(options)}"
    files = {split: folder / f"{split}.json" for split in ("train", "val")}
    for split, path in files.items():
        if not path.is_file():
            count = arguments["images"][split]
            named = [(f"{split}/{image_name(i)}", draw_scene(arguments["seed"], split, i)) for i in range(count)]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as workplace:
                # In one step, so that another process never sees half a file.
                unfinished = Path(workplace) / path.name
                write_json(unfinished, list(caption_records(split, named)))
                unfinished.replace(path)
    return replace(source, train=files["train"], val=files["val"])


def _key(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([VERSION, options], sort_keys=True).encode()).hexdigest()[:12]
