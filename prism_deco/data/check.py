"""Walks a whole data set: renders every conversation, decodes every image, and reports what is wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prism_deco.config import cache_dir
from prism_deco.config.registry import unknown
from prism_deco.data.base import Source
from prism_deco.data.check_report import CheckReport, Totals
from prism_deco.data.encoder import Encoder
from prism_deco.data.images import ImageSource
from prism_deco.data.records import Records, open_records
from prism_deco.data.validators import KINDS, Fault, TextInspector, inspect_image
from prism_deco.errors import UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Records start..end, and those of their images that no earlier record shows."""

    start: int
    end: int
    images: list[str]


@dataclass(frozen=True)
class ChunkFindings:
    """What inspecting a chunk showed. A fault of an image is listed once, with the first record that shows it."""

    totals: Totals
    faults: list[Fault]


class Inspector:
    """Inspects chunks; each worker process holds one."""

    def __init__(self, records: Records, images: ImageSource, encoder: Encoder):
        self._records = records
        self._entries = records.column("entry")
        self._images = images
        self._inspect_text = TextInspector(encoder)

    def __call__(self, chunk: Chunk) -> ChunkFindings:
        totals = Totals()
        faults: list[Fault] = []
        new = set(chunk.images)
        for row in range(chunk.start, chunk.end):
            record = self._records[row]
            entry = int(self._entries[row])
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
        return ChunkFindings(totals, faults)


def check_dataset(
    source: Source,
    encoder: Encoder,
    out: Path,
    *,
    workers: int | None = None,
    allow: Sequence[str] = (),
    chunk_size: int = 256,
) -> CheckReport:
    """Checks the training records of a source with all their images.

    Writes `bad.jsonl` (one fault per line and record) and `report.json` into `out`. An interrupted check resumes where
    it stopped; chunks with faults are inspected again, since their files may have been fixed.

    Args:
        encoder: tokenizer and length limits of the planned training.
        out: folder for the results.
        workers: processes; None takes all cores, 1 works in this one.
        allow: kinds of faults (`validators.KINDS`) that are reported but do not count as failure.
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
    faults += _repeated_ids(records)
    chunks = _chunks(records, chunk_size)
    journal = Journal(out / "progress.jsonl", _key(records, images, encoder, chunk_size))
    done = journal.read()
    if done:
        log.info("Resuming an interrupted check: %d of %d chunks are done", len(done), len(chunks))
    todo = [chunk for chunk in chunks if chunk.start not in done]
    totals = Totals()
    for chunk_totals in done.values():
        totals.add(chunk_totals)
    of_images: dict[str, Fault] = {}
    with _progress_bar() as bar:
        finished = len(records) - sum(chunk.end - chunk.start for chunk in todo)
        task = bar.add_task("records", total=len(records), completed=finished)
        for chunk, found in _run(todo, Inspector(records, images, encoder), workers or os.cpu_count() or 1):
            if not found.faults:
                journal.write(chunk.start, found.totals)
            totals.add(found.totals)
            faults += [fault for fault in found.faults if fault.image is None]
            of_images |= {fault.image: fault for fault in found.faults if fault.image is not None}
            bar.advance(task, chunk.end - chunk.start)
    faults += _for_every_record(of_images, records)
    faults.sort(key=lambda fault: (fault.entry, list(KINDS).index(fault.kind)))
    report = CheckReport(records.data_hash, totals, faults, tuple(allow), out / "bad.jsonl")
    report.path.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in faults), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    journal.path.unlink()
    return report


def _repeated_ids(records: Records) -> list[Fault]:
    first: dict[str, int] = {}
    repeated = []
    for entry, record in zip(records.column("entry").tolist(), records, strict=True):
        before = first.setdefault(record.id, entry)
        if before != entry:
            repeated.append(Fault("duplicate_id", entry, record.id, f"Record {before} of the file has the same id."))
    return repeated


def _chunks(records: Records, size: int) -> list[Chunk]:
    seen: set[str] = set()
    chunks = []
    for start in range(0, len(records), size):
        end = min(start + size, len(records))
        shown = dict.fromkeys(name for row in range(start, end) for name in records[row].images)
        chunks.append(Chunk(start, end, [name for name in shown if name not in seen]))
        seen |= shown.keys()
    return chunks


def _run(chunks: Sequence[Chunk], inspector: Inspector, workers: int) -> Iterator[tuple[Chunk, ChunkFindings]]:
    if workers == 1:
        yield from zip(chunks, map(inspector, chunks), strict=True)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(inspector,)) as pool:
        try:
            yield from zip(chunks, pool.map(_work, chunks), strict=True)
        except BrokenProcessPool as error:
            raise UsageError(
                "A worker process was killed, perhaps for lack of memory: run the command again with fewer --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_inspector: Inspector | None = None


def _start_worker(inspector: Inspector) -> None:
    global _inspector
    _inspector = inspector


def _work(chunk: Chunk) -> ChunkFindings:
    assert _inspector is not None
    return _inspector(chunk)


def _for_every_record(of_images: dict[str, Fault], records: Records) -> Iterator[Fault]:
    """The faults of images, once for every record that shows them."""
    if not of_images:
        return
    for entry, record in zip(records.column("entry").tolist(), records, strict=True):
        for name in dict.fromkeys(record.images):
            if name in of_images:
                yield replace(of_images[name], entry=entry, id=record.id)


def _key(records: Records, images: ImageSource, encoder: Encoder, chunk_size: int) -> str:
    """Differs wherever the results of an earlier check would."""
    parts = [records.data_hash, str(images), encoder.fingerprint, chunk_size, *KINDS]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


class Journal:
    """The totals of faultless chunks, one per line, from which an interrupted check resumes.

    Args:
        path: the file; the check deletes it when it is done.
        key: identifies the check; the totals of another one are not used.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        self._key = key

    def read(self) -> dict[int, Totals]:
        """Totals by the start of their chunk; rewrites the file with just these."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        header, *lines = text.split("\n")
        done = {}
        for line in lines if header == self._key else []:
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                break  # the check was killed while writing this line
            done[content["start"]] = Totals.from_json(content["totals"])
        self.path.write_text(f"{self._key}\n", encoding="utf-8")
        for start, totals in done.items():
            self.write(start, totals)
        return done

    def write(self, start: int, totals: Totals) -> None:
        """Adds a chunk; it is on disk at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"start": start, "totals": totals.to_json()}) + "\n")
