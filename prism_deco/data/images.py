"""Images by name: where their bytes are, and how they are decoded."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from prism_deco.errors import UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The image formats that are read. Pillow knows many more, and hands some of them to other programs: an EPS file, under
whatever name, to Ghostscript."""


class ImageSource(ABC):
    """Where images are read from: a folder, or a file that they were packed into (`packing.PackedImages`). `str` names
    the place. Picklable, for loader processes.

    Attributes:
        least_side: see `decode_image`; None decodes at full size.
    """

    least_side: int | None = None

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The encoded image (JPEG, PNG ...); `OSError` if there is none."""

    @abstractmethod
    def missing(self, names: Iterable[str]) -> list[str]:
        """The names without an image."""

    @abstractmethod
    def location(self, name: str) -> str:
        """Where the image is, for messages."""

    def contains(self, name: str) -> bool:
        """Whether the image lies inside the source once links are followed."""
        return True


class ImageFolder(ImageSource):
    """Image files under a root folder; names are paths relative to it."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes:
        return resolve_image(self.root, name).read_bytes()

    def missing(self, names: Iterable[str]) -> list[str]:
        # Lists each folder once: a stat call per image would take minutes on a network file system.
        by_folder: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_folder[resolve_image(self.root, name).parent].append(name)
        missing = []
        for folder, members in by_folder.items():
            # Not `Path.is_dir`, which raises for a name that is too long.
            entries = os.scandir(folder) if os.path.isdir(folder) else ()
            present = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
            missing += [name for name in members if os.path.basename(name) not in present]
        return missing

    def location(self, name: str) -> str:
        return str(self.root / name)

    def contains(self, name: str) -> bool:
        return Path(os.path.realpath(self.root / name)).is_relative_to(os.path.realpath(self.root))


class JoinedImages(ImageSource):
    """Images of several sources, named `NUMBER/NAME` by the source's number."""

    def __init__(self, parts: Sequence[ImageSource]):
        self.parts = parts

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts))

    def read(self, name: str) -> bytes:
        part, own = self._part(name)
        return part.read(own)

    def missing(self, names: Iterable[str]) -> list[str]:
        by_part: dict[str, list[str]] = defaultdict(list)
        for name in names:
            number, _, own = name.partition("/")
            by_part[number].append(own)
        return [f"{number}/{name}" for number, own in by_part.items() for name in self.parts[int(number)].missing(own)]

    def location(self, name: str) -> str:
        part, own = self._part(name)
        return part.location(own)

    def contains(self, name: str) -> bool:
        part, own = self._part(name)
        return part.contains(own)

    def _part(self, name: str) -> tuple[ImageSource, str]:
        number, _, own = name.partition("/")
        return self.parts[int(number)], own


def resolve_image(root: Path, name: str) -> Path:
    """The file of an image path under `root`; `UsageError` if it leads out of it (`..`, absolute)."""
    return root / path_below(root, name)


def path_below(root: Path | None, name: str) -> str:
    """An image path, made relative to `root`.

    Links are not followed: they are the user's own way to bring other folders in.

    Args:
        root: folder of the images; None refuses absolute paths.

    Raises:
        UsageError: it leads out of `root`.
    """
    short = os.path.normpath(name)
    if os.path.isabs(name) or name.startswith("\\"):
        for base in _spellings(root) if root is not None else ():
            if Path(short).is_relative_to(base):
                return str(Path(short).relative_to(base))
    elif ".." not in _parts(name):
        return name
    elif ".." not in _parts(short):
        return short
    raise UsageError(
        f"The image path {name!r} leads out of the image root {root}: name a root above it (/ allows any absolute "
        "path), or link its folder into this one."
    )


def _parts(name: str) -> list[str]:
    return name.replace("\\", "/").split("/")


@lru_cache(maxsize=8)
def _spellings(root: Path) -> tuple[str, str]:
    """A path may name the root through a link, or without it."""
    return os.path.abspath(root), os.path.realpath(root)


def open_image(path: Path) -> Image.Image:
    """Decodes an image file that the user names, as RGB.

    Raises:
        UsageError: it is missing, cannot be read, or is no image of one of `FORMATS`.
    """
    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        if error.strerror is None:  # of `decode_image`
            raise UsageError(str(error)) from error
        raise UsageError(f"{path} cannot be read ({error.strerror}): name an image, {', '.join(FORMATS)}.") from error


def load_image(source: ImageSource, name: str) -> Image.Image:
    """Decodes an image of a source as RGB; see `decode_image`."""
    return decode_image(source.read(name), source.location(name), least_side=source.least_side)


def open_bytes(data: bytes) -> Image.Image:
    """Opens an encoded image, of one of `FORMATS` only; everything that reads image files goes through here."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode_image(data: bytes, location: str, *, least_side: int | None = None) -> Image.Image:
    """Decodes an image as RGB.

    Args:
        least_side: decode a JPEG at a half, a quarter or an eighth of its size, the smallest at which both sides keep
            that many pixels (libjpeg's scaled decoding): faster, and finds the same damage.

    Raises:
        OSError: it is truncated, implausibly large or not an image; the message names the `location`.
    """
    try:
        with open_bytes(data) as image:
            if least_side is not None:
                image.draft("RGB", (least_side, least_side))
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise OSError(f"{location} cannot be decoded as an image ({decoding_problem(error)}).") from error


def decoding_problem(error: Exception) -> str:
    """What an error of Pillow says about an image that was read from memory."""
    if isinstance(error, UnidentifiedImageError):  # its own message names the buffer
        return f"its format is none of {', '.join(FORMATS)}"
    return str(error)
