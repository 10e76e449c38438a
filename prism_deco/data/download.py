"""Downloads of large files that survive broken connections: ranged requests, appended to a partial file."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import prism_deco
from prism_deco.errors import UsageError
from prism_deco.files import file_sha256

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may be another tomorrow


@dataclass(frozen=True)
class Remote:
    """What a server says about a file.

    Attributes:
        size: bytes; None where it does not say.
        version: changes with the content (ETag or modification date); None where it does not say.
    """

    size: int | None
    version: str | None


def look_up(url: str) -> Remote:
    """Asks the server for size and version, without the content; `OSError` where it does not have the file."""
    try:
        with _open(url, method="HEAD") as response:
            return _remote(response.headers)
    except _BROKEN as error:
        raise OSError(f"{url} cannot be reached ({error}).") from error


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    attempts: int = 8,
    pause: float = 1.0,
    progress: Callable[[int, int | None], None] = lambda done, size: None,
) -> None:
    """Downloads a file to `target`, and goes on with what an earlier call has left in `<target>.part`.

    The file appears under its name only when it is whole: its size is what the server said, and its
    SHA-256 what it should be. If the server's file changed meanwhile, it is fetched anew.

    Args:
        sha256: expected digest, hexadecimal; None checks the size only.
        attempts: connections in a row that may bring nothing new.
        pause: seconds after the first of these; doubles each time.
        progress: called with the bytes that are there and their final number, if it is known.

    Raises:
        OSError: the server refuses the file, breaks off again and again, or sends other content.
    """
    partial = Partial(target)
    failures = 0
    while True:
        before = partial.size
        try:
            if _fetch(url, partial, progress):
                break
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code not in _PASSING:
                raise OSError(f"{url}: the server answers {error.code} {error.reason}. Has the file moved?") from error
            reason = f"{error.code} {error.reason}"
        except _BROKEN as error:
            reason = str(error) or type(error).__name__
        failures = 0 if partial.size > before else failures + 1
        if failures >= attempts:
            raise OSError(
                f"{url} broke off {failures} times in a row ({reason}). What is there is kept: try again later."
            )
        log.warning("%s: %s at %d bytes; going on", url, reason, partial.size)
        if failures:
            time.sleep(min(60.0, pause * 2 ** (failures - 1)))
    partial.finish(sha256)


class Partial:
    """A file that is not whole yet, and the version of the server's file that it is a part of."""

    def __init__(self, target: Path):
        self.target = target
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def version(self) -> str | None:
        """None where the part cannot be trusted."""
        return json.loads(self._note.read_text())["version"] if self._note.is_file() else None

    def begin(self, remote: Remote) -> None:
        """Starts from nothing."""
        self.path.write_bytes(b"")
        self._note.write_text(json.dumps({"version": remote.version}))

    def finish(self, sha256: str | None) -> None:
        """Moves the whole file to its name; `OSError` where it is not the expected one."""
        if sha256 is not None:
            found = file_sha256(self.path)
            if found != sha256:
                self.path.unlink()
                raise OSError(f"{self.target} has the SHA-256 {found}, expected was {sha256}. It was removed.")
        self.path.replace(self.target)
        self._note.unlink(missing_ok=True)


def _fetch(url: str, partial: Partial, progress: Callable[[int, int | None], None]) -> bool:
    """One connection; whether the file is whole after it."""
    start, version = partial.size, partial.version
    # Without a version there is no telling whether the rest would fit the part.
    headers = {"Range": f"bytes={start}-", "If-Range": version} if start and version else {}
    try:
        response = _open(url, headers=headers)
    except urllib.error.HTTPError as error:
        size = error.headers.get("Content-Range", "").rpartition("/")[2]
        if error.code == 416 and size == str(start):
            return True  # nothing is missing but the new name
        if error.code != 416:
            raise
        partial.begin(Remote(None, None))  # the part is longer than the file: not a part of it
        return False
    with response:
        remote = _remote(response.headers)
        if response.status != 206:
            start = 0
            partial.begin(remote)
        elif _range_start(response.headers) != start:
            raise http.client.HTTPException("the server sent another part than the one asked for")
        whole = None if remote.size is None else start + remote.size
        with partial.path.open("ab") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                progress(file.tell(), whole)
        return whole is None or partial.size == whole


def _range_start(headers: Message) -> int:
    first = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else -1


def _remote(headers: Message) -> Remote:
    length, version = headers.get("Content-Length"), headers.get("ETag") or headers.get("Last-Modified")
    # A weak ETag ("W/...") may stand for other bytes: If-Range does not take it.
    if version and version.startswith("W/"):
        version = headers.get("Last-Modified")
    return Remote(int(length) if length and length.isdigit() else None, version)


def _open(url: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: only http and https addresses can be downloaded.")
    own = {"User-Agent": f"prism-deco/{prism_deco.__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=own | (headers or {}), method=method)
    return urllib.request.urlopen(request, timeout=_TIMEOUT)
