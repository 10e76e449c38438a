"""Checks the images of a benchmark before the first question is asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prism_deco.data.images import decode_image
from prism_deco.errors import UsageError
from prism_deco.evaluation.items import Item
from prism_deco.machine import cores

log = logging.getLogger(__name__)

# Pillow releases the GIL while it decodes. More than 16 threads do not speed up a disk.
_THREADS = min(16, cores())


def bad_images(items: Sequence[Item], on_bad_image: str) -> set[str]:
    """The names (of `Item.images`) of images that are missing or cannot be decoded. If `on_bad_image` is "fail", the
    first is a `UsageError`.

    Decodes every image once, in threads and at a reduced size. Reading headers would not find truncated files.
    """
    first_use: dict[str, tuple[Path, str]] = {}
    for item in items:
        for name, path in zip(item.images, item.paths, strict=True):
            first_use.setdefault(name, (path, item.question_id))
    log.info("Checking %d images", len(first_use))
    bad: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(_problem, (path for path, _ in first_use.values()))
        for (name, (path, question_id)), problem in zip(first_use.items(), problems, strict=True):
            if problem is not None and on_bad_image == "fail":
                # Leaving the context would otherwise wait until all other images are decoded.
                pool.shutdown(cancel_futures=True)
                raise UsageError(
                    f"Question {question_id}: the image {path} is missing or unreadable ({problem}). "
                    "Restore it, or set on_bad_image=count_wrong."
                ) from problem
            if problem is not None:
                bad.append(name)
    if bad:
        log.warning("%d images are missing or unreadable (first: %s); their questions count as wrong", len(bad), bad[0])
    return set(bad)


def _problem(path: Path) -> OSError | None:
    try:
        decode_image(path.read_bytes(), str(path), least_side=1)
    except OSError as error:
        return error
    return None
