"""Reading parts of large files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class PartialReader:
    """Reads byte ranges of a file, from any process it is taken to.

    Deliberately no memory map: the pages that a process alone has touched count as its own, and over an
    epoch that is the whole file. The system's page cache serves all processes just as well.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: io.FileIO | None = None

    def read(self, start: int, end: int) -> bytes:
        """Bytes start..end of the file."""
        if self._file is None:
            self._file = io.FileIO(self._path)
        # Takes its position as an argument: forked processes share a file's own.
        return os.pread(self._file.fileno(), end - start, start)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}
