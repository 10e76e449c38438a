"""Walks a whole data set: renders every conversation, decodes every image, and reports what is wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prism_deco.config import cache_dir
from prism_deco.config.registry import unknown
from prism_deco.data.base import Source
from prism_deco.data.check_report import Report, Totals
from prism_deco.data.examples import Encoder
from prism_deco.data.images import ImageSource
from prism_deco.data.records import Records, open_records
from prism_deco.data.validators import KINDS, Fault, TextInspector, inspect_image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Records start..end, and those of their images that no earlier record shows."""

    start: int
    end: int
    images: list[str]


@dataclass(frozen=True)
class Result:
    """What came of a chunk. A fault of an image is noted once, with the first record that shows it."""

    start: int
    totals: Totals
    faults: list[Fault]

    def to_json(self) -> dict[str, Any]:
        return {"start": self.start, "totals": self.totals.to_json(), "faults": [asdict(f) for f in self.faults]}


class Inspector:
    """Inspects chunks; worker processes hold one each."""

    def __init__(self, records: Records, images: ImageSource, encoder: Encoder):
        self._records = records
        self._images = images
        self._inspect_text = TextInspector(encoder)

    def __call__(self, chunk: Chunk) -> Result:
        totals, faults = Totals(), []
        new = set(chunk.images)
        for row in range(chunk.start, chunk.end):
            record, entry = self._records[row], int(self._records.entries[row])
            text = self._inspect_text(record)
            totals.add_text(text, has_image=bool(record.images))
            faults += [Fault(kind, entry, record.id, detail) for kind, detail in text.faults]
            for name in record.images:
                if name not in new:
                    continue
                new.remove(name)
                found = inspect_image(self._images, name)
                totals.add_image(found)
                if found.kind is not None:
                    faults.append(Fault(found.kind, entry, record.id, found.detail, name))
        return Result(chunk.start, totals, faults)


def check(
    source: Source,
    encoder: Encoder,
    out: Path,
    *,
    workers: int | None = None,
    allow: Sequence[str] = (),
    chunk_size: int = 256,
) -> Report:
    """Checks the training records of a source with all their images.

    Writes `bad.jsonl` (one fault per line and record) and `report.json` into `out`. A check that was
    interrupted goes on where it stopped when it is called again; parts with faults are looked at anew.

    Args:
        encoder: tokeniser and room of the training that is planned.
        out: folder for the results.
        workers: processes; None takes all cores, 1 works in this one.
        allow: kinds of faults (`faults.KINDS`) that are reported but do not count as failure.
        chunk_size: records that are handed out at a time.

    Raises:
        UsageError: an unknown kind in `allow`, or a file that cannot be read at all.
    """
    for kind in allow:
        if kind not in KINDS:
            raise unknown("kind of fault", kind, KINDS)
    records = open_records(source.train, cache_dir(), image_root=source.image_root, allow_faults=True)
    images = source.images(records)
    out.mkdir(parents=True, exist_ok=True)
    log.info("Checking %d records of %s", len(records), source.train)
    faults = [Fault(f["kind"], f["entry"], f["id"], f["detail"]) for f in records.faults]
    chunks, repeated = _plan(records, chunk_size)
    faults += repeated
    journal = Journal(out / "progress.jsonl", _key(records, images, encoder, chunk_size))
    done = journal.read()
    if done:
        log.info("Going on where the last check stopped: %d of %d parts are done", len(done), len(chunks))
    todo = [chunk for chunk in chunks if chunk.start not in done]
    results = [*done.values()]
    with _progress_bar() as bar, journal:
        task = bar.add_task("records", total=len(records), completed=len(records) - sum(c.end - c.start for c in todo))
        for chunk, result in _run(todo, Inspector(records, images, encoder), workers or os.cpu_count() or 1):
            journal.write(result)
            results.append(result)
            bar.advance(task, chunk.end - chunk.start)
    totals = Totals()
    for result in results:
        totals.add(result.totals)
        faults += [fault for fault in result.faults if fault.image is None]
    faults += _spread({f.image: f for r in results for f in r.faults if f.image is not None}, records)
    faults.sort(key=lambda fault: (fault.entry, list(KINDS).index(fault.kind)))
    report = Report(records.data_hash, totals, faults, tuple(allow), out / "bad.jsonl")
    report.path.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in faults), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    journal.path.unlink()
    return report


def _plan(records: Records, chunk_size: int) -> tuple[list[Chunk], list[Fault]]:
    """The chunks, and the records whose id occurred before: both need to know all records."""
    ids: dict[str, int] = {}
    first_rows: dict[str, int] = {}
    repeated = []
    for row, record in enumerate(records):
        entry = int(records.entries[row])
        before = ids.setdefault(record.id, entry)
        if before != entry:
            repeated.append(Fault("duplicate_id", entry, record.id, f"Record {before} of the file has the same id."))
        for name in record.images:
            first_rows.setdefault(name, row)
    names, rows = list(first_rows), list(first_rows.values())  # rows never decrease
    chunks = []
    for start in range(0, len(records), chunk_size):
        end = min(start + chunk_size, len(records))
        chunks.append(Chunk(start, end, names[bisect_left(rows, start) : bisect_left(rows, end)]))
    return chunks, repeated


def _run(chunks: Sequence[Chunk], inspector: Inspector, workers: int) -> Iterator[tuple[Chunk, Result]]:
    if workers == 1:
        yield from ((chunk, inspector(chunk)) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(inspector,))
    waiting = iter(chunks)
    running: dict[Future[Result], Chunk] = {}
    try:
        while True:
            # A few per worker at a time: results must not pile up behind a slow consumer.
            for chunk in islice(waiting, 4 * workers - len(running)):
                running[pool.submit(_work, chunk)] = chunk
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "A checking process was killed, for want of memory perhaps: start again with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_inspector: Inspector | None = None


def _start_worker(inspector: Inspector) -> None:
    global _inspector
    _inspector = inspector


def _work(chunk: Chunk) -> Result:
    assert _inspector is not None
    return _inspector(chunk)


def _spread(by_image: dict[str, Fault], records: Records) -> Iterator[Fault]:
    """The faults of images, once for every record that shows them."""
    if not by_image:
        return
    for row, record in enumerate(records):
        for name in dict.fromkeys(record.images):
            if name in by_image:
                yield replace(by_image[name], entry=int(records.entries[row]), id=record.id)


def _key(records: Records, images: ImageSource, encoder: Encoder, chunk_size: int) -> str:
    """Tells whether the results of an earlier check are still those of this one."""
    parts = [records.data_hash, str(images), encoder.fingerprint, chunk_size]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


class Journal:
    """The results so far, one per line, so that a check can go on after an interruption.

    Args:
        path: the file; removed by whoever is done with it.
        key: identifies the check; the results of another one are not used.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        self._key = key

    def read(self) -> dict[int, Result]:
        """Results without faults of the same check, by the start of their chunk; others are dropped."""
        done = {result.start: result for result in self._results() if not result.faults}
        with self.path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key}) + "\n")
            file.writelines(json.dumps(result.to_json()) + "\n" for result in done.values())
        return done

    def _results(self) -> Iterable[Result]:
        if not self.path.is_file():
            return
        header, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
        if header != json.dumps({"key": self._key}):
            return
        for line in lines:
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                return  # the last line of a check that was killed while writing it
            faults = [Fault(**fault) for fault in content["faults"]]
            yield Result(content["start"], Totals.from_json(content["totals"]), faults)

    def __enter__(self) -> Journal:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, result: Result) -> None:
        """Notes a result; it is on disk at once."""
        self._file.write(json.dumps(result.to_json()) + "\n")
        self._file.flush()
