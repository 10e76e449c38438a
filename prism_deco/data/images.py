"""Images on disk: found before training starts, opened safely, never replaced in silence."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError


def resolve_image(root: Path, name: str) -> Path:
    """The file that `name` means under `root`; `ValueError` where it points outside (`..`, absolute)."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"The image path {name!r} leaves the image root {root}: image paths must be relative to it.")
    return root / name


def open_image(path: Path) -> Image.Image:
    """Decodes an image as RGB.

    Raises:
        OSError: it is missing, truncated or no image at all; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise OSError(f"{path} cannot be decoded as an image ({error}).") from error


def missing_images(root: Path, names: Iterable[str]) -> list[str]:
    """Names without a file under `root`. Lists every folder once: a stat call per image would take
    minutes on a network file system."""
    by_folder: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_folder[resolve_image(root, name).parent].append(name)
    missing = []
    for folder, members in by_folder.items():
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        missing += [name for name in members if os.path.basename(name) not in present]
    return missing
