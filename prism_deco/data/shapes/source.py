"""The miniature world as a data source: built into the cache on first use."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from prism_deco.config import cache_dir
from prism_deco.data.base import SOURCES, Source
from prism_deco.data.shapes.world import VERSION, build_world


@SOURCES.register("shapes")
def shapes(**options: Any) -> Source:
    """The files of the world with these options (`build_world`), one cached folder for each set of them."""
    key = hashlib.sha256(json.dumps([VERSION, options], sort_keys=True).encode()).hexdigest()[:12]
    world = build_world(cache_dir() / f"shapes-{key}", **options)
    return Source(world / "train.json", world / "images", val=world / "val.json", benchmarks=world)
