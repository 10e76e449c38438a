"""Takes image files out of ZIP archives."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath


def extract(
    archive: Path, folder: Path, wanted: Collection[str], progress: Callable[[int], None] = lambda done: None
) -> int:
    """Extracts the wanted files of a ZIP archive; returns how many it had.

    Archives differ in the folders they wrap around the same files, so a member is taken for the wanted
    path that its own path ends with. Nothing is written but the wanted paths under `folder`. Each file
    appears when it is whole; ZIP's checksums are verified.

    Args:
        wanted: paths relative to `folder`.
        progress: called with the number of files that are done.

    Raises:
        OSError: the archive is damaged; the message names it.
    """
    names, found = set(wanted), 0
    try:
        with zipfile.ZipFile(archive) as content:
            for member in content.infolist():
                name = _match(PurePosixPath(member.filename), names)
                if name is None or member.is_dir():
                    continue
                names.discard(name)
                found += 1
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.part")
                with content.open(member) as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file)
                os.replace(temporary, target)
                progress(found)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise OSError(f"{archive} is damaged ({error}): remove it and start again.") from error
    return found


def _match(path: PurePosixPath, wanted: Collection[str]) -> str | None:
    parts = path.parts
    return next((name for i in range(len(parts)) if (name := "/".join(parts[i:])) in wanted), None)
