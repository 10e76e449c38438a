"""Image sources, which read encoded images by name, and decoding."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath

from PIL import Image, UnidentifiedImageError

from prism_deco.errors import UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The image formats that are read. Pillow knows many more, some of which it passes to other programs: an EPS file,
whatever its suffix, to Ghostscript."""


class ImageSource(ABC):
    """Reads encoded images by name, from a folder or from one packed file (`packing.PackedImages`).

    `str()` gives its path, for messages. Picklable, for loader processes.

    Attributes:
        least_side: see `decode_image`; None decodes at full size.
    """

    least_side: int | None = None

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The encoded image (JPEG, PNG ...); `OSError` if there is none."""

    @abstractmethod
    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that have no image."""

    @abstractmethod
    def location(self, name: str) -> str:
        """The image's path, for messages."""

    def contains(self, name: str) -> bool:
        """Whether the image is inside the source after symbolic links are resolved."""
        return True


@dataclass(eq=False)
class ImageFolder(ImageSource):
    """Image files under a root folder; names are paths relative to it."""

    root: Path

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
    """Images of several sources; `NUMBER/NAME` is the image NAME of source NUMBER."""

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
    """The file of an image path under `root`; `UsageError` if the path leaves `root` (see `path_below`)."""
    return root / path_below(root, name)


def path_below(root: Path | None, name: str) -> str:
    """Makes an image path relative to `root`; `UsageError` if it leaves `root` (by `..`, or as an absolute path).

    Symbolic links are not resolved: users may link other folders into `root`.

    Args:
        root: folder of the images; None refuses absolute paths.
    """
    short = os.path.normpath(name)
    if os.path.isabs(name) or name.startswith("\\"):
        for base in _spellings(root) if root is not None else ():
            if Path(short).is_relative_to(base):
                return str(Path(short).relative_to(base))
    elif ".." not in PureWindowsPath(name).parts:  # which splits at both / and \
        return name
    elif ".." not in PureWindowsPath(short).parts:
        return short
    raise UsageError(
        f"The image path {name!r} leads out of the image root {root}: name a root above it (/ allows any absolute "
        "path), or link its folder into this one."
    )


@lru_cache(maxsize=8)
def _spellings(root: Path) -> tuple[str, str]:
    """The root as given and with symbolic links resolved: absolute image paths may use either."""
    return os.path.abspath(root), os.path.realpath(root)


def open_image(path: Path) -> Image.Image:
    """Decodes an image file given by the user, as RGB; `UsageError` if that is not possible."""
    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        if error.strerror is None:  # raised by `decode_image`
            raise UsageError(str(error)) from error
        raise UsageError(f"{path} cannot be read ({error.strerror}): name an image, {', '.join(FORMATS)}.") from error


def load_image(source: ImageSource, name: str) -> Image.Image:
    """Decodes an image of a source as RGB; see `decode_image`."""
    return decode_image(source.read(name), source.location(name), least_side=source.least_side)


def open_bytes(data: bytes) -> Image.Image:
    """Opens an encoded image in one of `FORMATS`. All reading of image files goes through this function."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode_image(data: bytes, location: str, *, least_side: int | None = None) -> Image.Image:
    """Decodes an image as RGB.

    Args:
        least_side: decode a JPEG at a half, a quarter or an eighth of its size (libjpeg's scaled decoding), the
            smallest at which both sides keep this many pixels. This is faster, and finds the same damage.

    Raises:
        OSError: the image is truncated, implausibly large or not an image; the message names the `location`.
    """
    try:
        with open_bytes(data) as image:
            if least_side is not None:
                image.draft("RGB", (least_side, least_side))
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise OSError(f"{location} cannot be decoded as an image ({decoding_problem(error)}).") from error


def decoding_problem(error: Exception) -> str:
    """The message of a Pillow error for an image opened from memory."""
    if isinstance(error, UnidentifiedImageError):  # its own message names the buffer
        return f"its format is none of {', '.join(FORMATS)}"
    return str(error)
