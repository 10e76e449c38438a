"""Resumable downloads of large files: range requests, appended to a partial file."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import prism_deco
from prism_deco.errors import UsageError

log = logging.getLogger(__name__)

_BLOCK = 1 << 20  # bytes
_TIMEOUT = 60.0  # seconds without a byte
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth a retry


def download(
    url: str,
    target: Path,
    *,
    attempts: int = 8,
    pause: float = 1.0,
    progress: Callable[[int, int | None], None] = lambda done, size: None,
) -> None:
    """Downloads a file to `target`, resuming from `<target>.part` if an earlier call left one.

    `target` appears only when it has the size that the server announced. If the file has changed on the server since
    the earlier call, the download starts over.

    Args:
        attempts: consecutive connections without a new byte before giving up.
        pause: seconds to wait after the first of these; doubles each time.
        progress: called with the bytes so far and the total, or None if that is unknown.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: only http and https addresses can be downloaded.")
    part = target.with_name(f"{target.name}.part")
    failures = 0
    while True:
        before = _size(part)
        try:
            if _fetch(url, part, progress):
                break
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code not in _TRANSIENT:
                raise UsageError(f"{url}: the server answers {reason}. Has the file moved?") from error
        except _BROKEN as error:
            reason = str(error) or type(error).__name__
        failures = 0 if _size(part) > before else failures + 1
        if failures >= attempts:
            raise UsageError(f"{url} failed {failures} times in a row ({reason}). Try again later: {part} is kept.")
        log.warning("%s: %s after %d bytes; resuming", url, reason, _size(part))
        if failures:
            time.sleep(min(60.0, pause * 2 ** (failures - 1)))
    part.replace(target)
    _version_file(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path, progress: Callable[[int, int | None], None]) -> bool:
    """Appends the bytes of one connection to `part`; returns whether the file is complete."""
    start = _size(part)
    note = _version_file(part)
    version = json.loads(note.read_text())["version"] if note.is_file() else None
    headers = {"User-Agent": f"prism-deco/{prism_deco.__version__}", "Accept-Encoding": "identity"}
    if start and version:  # without a version, the rest may belong to another file
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(start):
            return True  # `part` is already complete
        part.write_bytes(b"")  # longer than the file, so not a part of it
        return False
    with response:
        if response.status != 206:
            start = 0
            part.write_bytes(b"")
            note.write_text(json.dumps({"version": _version(response.headers)}))
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException("the server sent a range that was not asked for")
        length = response.headers.get("Content-Length", "")
        size = start + int(length) if length.isdigit() else None
        with part.open("ab") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                progress(file.tell(), size)
    return size is None or _size(part) == size


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _version(headers: Message) -> str | None:
    """An identifier that changes with the content; None if the server sends none."""
    etag = headers.get("ETag")
    # If-Range does not accept a weak ETag ("W/..."): files with different bytes may share it.
    return headers.get("Last-Modified") if etag is None or etag.startswith("W/") else etag
