"""Checks a whole data set: renders every conversation, decodes every image, and reports all faults."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text
from torch.utils.data import DataLoader

from prism_deco.config import cache_dir
from prism_deco.config.registry import unknown
from prism_deco.data.base import Source
from prism_deco.data.encoder import Encoder
from prism_deco.data.records import open_records
from prism_deco.data.validators import KINDS, Fault, ImageFindings, TextFindings, TextInspector, inspect_image
from prism_deco.errors import UsageError
from prism_deco.files import refusals_named, write_json, write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        data_hash: SHA-256 of the records' file.
        totals: the counts that `report.json` holds as well.
        faults: in the order of the file.
        allowed: kinds that are reported but do not fail the check.
        path: the path of `bad.jsonl`.
    """

    data_hash: str
    totals: dict[str, Any]
    faults: Sequence[Fault]
    allowed: Sequence[str]
    path: Path

    @property
    def exit_status(self) -> int:
        """1 if there is a fault that is not allowed, else 0."""
        return int(any(fault.kind not in self.allowed for fault in self.faults))

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults by kind."""
        found = Counter(fault.kind for fault in self.faults)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def render(self) -> Group:
        """The report as rich tables."""
        tables = [self._overview(), self._histogram()]
        return Group(*tables, self._fault_table()) if self.faults else Group(*tables)

    def _overview(self) -> Table:
        t = self.totals
        table = Table("", Column(justify="right"), title="Data set", show_header=False)
        supervised = _percent(t["supervised"] - t["supervised_cut"], t["tokens"] - t["tokens_cut"])
        formats = ", ".join(f"{n:,} {name}" for name, n in t["formats"].most_common())
        table.add_row("usable records", f"{t['records']:,}")
        table.add_row("with images", f"{t['with_image']:,}")
        table.add_row("text only", f"{t['records'] - t['with_image']:,}")
        table.add_row("image files", f"{t['images']:,} ({t['image_bytes'] / 1e9:.3f} GB)")
        table.add_row("formats", formats or "none readable")
        table.add_row("text tokens", f"{t['tokens']:,}, longest record {t['longest']:,}")
        table.add_row("supervised", f"{supervised} of those kept")
        table.add_row("truncated", f"{t['tokens_cut']:,} tokens of {t['records_cut']:,} records")
        table.add_row("supervised among these", f"{t['supervised_cut']:,}")
        table.add_row("hash of the records", self.data_hash)
        table.add_row("hash of the images", t["image_hash"])
        return table

    def _histogram(self) -> Table:
        numbers = Column("text tokens", justify="right"), Column("records", justify="right")
        table = Table(*numbers, "fraction", title="Lengths of the records")
        lengths = self.totals["lengths"]
        for size in range(min(lengths, default=0), max(lengths, default=-1) + 1):
            count = lengths[size]
            bar = "█" * round(40 * count / max(lengths.values()))
            low = 2 ** (size - 1) + 1 if size > 1 else size + 1
            label = f"{low}" if low >= 2**size else f"{low} to {2**size}"
            table.add_row(label, f"{count:,}", f"{bar} {_percent(count, self.totals['records'])}")
        return table

    def _fault_table(self) -> Table:
        caption = Text(f"Listed one by one in {self.path}", "table.caption")
        table = Table("kind", Column("number", justify="right"), "meaning", title="Faults", caption=caption)
        for kind, number in self.counts.items():
            table.add_row(kind, f"{number:,}{' (allowed)' if kind in self.allowed else ''}", KINDS[kind])
        return table


def check_dataset(
    source: Source, encoder: Encoder, out: Path, *, workers: int = 2, allow: Sequence[str] = ()
) -> CheckReport:
    """Checks the training records of a source with all their images.

    Writes `bad.jsonl` (one fault of one record per line) and `report.json` into `out`.

    Args:
        encoder: tokenizer and length limits of the planned training.
        workers: number of processes, at least 1, which runs in this process.
        allow: kinds of faults (`validators.KINDS`) that are reported but do not fail the check.
    """
    for kind in allow:
        if kind not in KINDS:
            raise unknown("kind of fault", kind, KINDS)
    if source.mixture:
        raise UsageError("A mixture is checked set by set: name each as data=..., with its own keys.")
    records = open_records(source.train, cache_dir(), image_root=source.image_root, allow_faults=True)
    images = source.images(records)
    out.mkdir(parents=True, exist_ok=True)
    log.info("Checking %d records of %s", len(records), source.train)
    entries = records.column("entry").tolist()
    faults = [
        Fault(f["kind"], f["entry"], f["id"], f["detail"]) for f in [*records.refused("refuse"), *records.noted()]
    ]
    # An image is inspected once, and its fault is listed for every record that shows it.
    ids: list[str] = []
    first: dict[str, int] = {}
    shown_by: dict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(records):
        ids.append(record.id)
        entry = first.setdefault(record.id, entries[row])
        if entry != entries[row]:
            detail = f"Record {entry} of the file has the same id."
            faults.append(Fault("duplicate_id", entries[row], record.id, detail))
        for name in dict.fromkeys(record.images):
            shown_by[name].append(row)
    texts = _inspect_all("records", TextInspector(encoder), records, workers)
    for row, text in enumerate(texts):
        faults += [Fault(kind, entries[row], ids[row], detail) for kind, detail in text.faults]
    found = _inspect_all("images", partial(inspect_image, images), list(shown_by), workers)
    for (name, rows), image in zip(shown_by.items(), found, strict=True):
        if image.fault is not None:
            kind, detail = image.fault
            faults += [Fault(kind, entries[row], ids[row], detail, name) for row in rows]
    faults.sort(key=lambda fault: (fault.entry, list(KINDS).index(fault.kind)))
    totals = {"records": len(records), "with_image": int(records.has_image.sum()), **_totals(texts, found)}
    report = CheckReport(records.data_hash, totals, faults, tuple(allow), out / "bad.jsonl")
    with refusals_named(out, "Name another folder with --out.", "written"):
        write_whole(report.path, "".join(json.dumps(asdict(fault)) + "\n" for fault in faults))
        write_json(out / "report.json", {"data_hash": report.data_hash, "faults": report.counts, **totals})
    return report


def _inspect_all(what: str, inspect: Callable[[Any], Any], items: Sequence[Any], workers: int) -> list[Any]:
    """Inspects all items, in their order, behind a progress bar."""
    loader = DataLoader(
        items,  # type: ignore[arg-type]  # any sequence
        batch_size=64,
        num_workers=workers if workers > 1 else 0,
        collate_fn=partial(_inspect_batch, inspect),  # called in the worker processes
    )
    found = (finding for batch in loader for finding in batch)
    return list(track(found, what, total=len(items), console=Console(stderr=True)))


def _inspect_batch(inspect: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [inspect(item) for item in items]


def _totals(texts: Sequence[TextFindings], images: Sequence[ImageFindings]) -> dict[str, Any]:
    lengths = [text.length for text in texts]
    digests = [int(image.digest, 16) for image in images if image.digest is not None]
    return {
        "images": len(images),
        "image_bytes": sum(image.bytes for image in images),
        "tokens": sum(lengths),
        "supervised": sum(text.supervised for text in texts),
        "records_cut": sum(text.cut > 0 for text in texts),
        "tokens_cut": sum(text.cut for text in texts),
        "supervised_cut": sum(text.supervised_cut for text in texts),
        "longest": max(lengths, default=0),
        # Number of records by length class k: more than 2^(k-1) and at most 2^k text tokens.
        "lengths": Counter((length - 1).bit_length() for length in lengths if length),
        "formats": Counter(image.format for image in images if image.format is not None),
        # A sum, which does not depend on the order of the images.
        "image_hash": f"{sum(digests) % 2**256:064x}",
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
