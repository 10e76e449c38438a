"""Walks a whole data set: renders every conversation, decodes every image, and reports what is wrong."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from prism_deco.config import cache_dir
from prism_deco.config.registry import unknown
from prism_deco.data.base import Source
from prism_deco.data.encoder import Encoder
from prism_deco.data.records import open_records
from prism_deco.data.validators import KINDS, Fault, ImageFindings, TextFindings, TextInspector, inspect_image

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Sums over the records and images; each image counts once.

    Attributes:
        lengths: records by length class: class k has more than 2^(k-1) and up to 2^k tokens of text.
        formats: images by file format.
        image_hash: sum of the images' SHA-256 modulo 2^256, which does not depend on their order.
    """

    records: int = 0
    with_image: int = 0
    images: int = 0
    image_bytes: int = 0
    tokens: int = 0
    supervised: int = 0
    records_cut: int = 0
    tokens_cut: int = 0
    supervised_cut: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    image_hash: int = 0

    def add_text(self, found: TextFindings) -> None:
        """Counts one record."""
        self.records += 1
        self.tokens += found.length
        self.supervised += found.supervised
        self.records_cut += found.cut > 0
        self.tokens_cut += found.cut
        self.supervised_cut += found.supervised_cut
        self.longest = max(self.longest, found.length)
        if found.length:
            self.lengths[(found.length - 1).bit_length()] += 1

    def add_image(self, found: ImageFindings) -> None:
        """Counts one image file."""
        self.images += 1
        self.image_bytes += found.bytes
        if found.format is not None:
            self.formats[found.format] += 1
        if found.digest is not None:
            self.image_hash = (self.image_hash + int(found.digest, 16)) % 2**256


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        data_hash: SHA-256 of the records' file.
        faults: in the order of the file.
        allowed: kinds that are reported but do not count as failure.
        path: of `bad.jsonl`.
    """

    data_hash: str
    totals: Totals
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

    def to_json(self) -> dict[str, Any]:
        """The report without the individual faults, which are in `bad.jsonl`."""
        totals = vars(self.totals) | {"image_hash": f"{self.totals.image_hash:064x}"}
        return {"data_hash": self.data_hash, "faults": self.counts, **totals}

    def render(self) -> Group:
        """The report as tables of rich."""
        tables = [self._overview(), self._histogram()]
        return Group(*tables, self._fault_table()) if self.faults else Group(*tables)

    def _overview(self) -> Table:
        t = self.totals
        table = Table("", Column(justify="right"), title="Data set", show_header=False)
        supervised = _percent(t.supervised - t.supervised_cut, t.tokens - t.tokens_cut)
        formats = ", ".join(f"{n:,} {name}" for name, n in t.formats.most_common())
        table.add_row("usable records", f"{t.records:,}")
        table.add_row("with images", f"{t.with_image:,}")
        table.add_row("text only", f"{t.records - t.with_image:,}")
        table.add_row("image files", f"{t.images:,} ({t.image_bytes / 1e9:.3f} GB)")
        table.add_row("formats", formats or "none readable")
        table.add_row("text tokens", f"{t.tokens:,}, longest record {t.longest:,}")
        table.add_row("supervised", f"{supervised} of those kept")
        table.add_row("truncated", f"{t.tokens_cut:,} tokens of {t.records_cut:,} records")
        table.add_row("supervised among these", f"{t.supervised_cut:,}")
        table.add_row("hash of the records", self.data_hash)
        table.add_row("hash of the images", f"{t.image_hash:064x}")
        return table

    def _histogram(self) -> Table:
        numbers = Column("text tokens", justify="right"), Column("records", justify="right")
        table = Table(*numbers, "fraction", title="Lengths of the records")
        lengths = self.totals.lengths
        for size in range(min(lengths, default=0), max(lengths, default=-1) + 1):
            count = lengths[size]
            bar = "█" * round(40 * count / max(lengths.values()))
            low = 2 ** (size - 1) + 1 if size > 1 else size + 1
            label = f"{low}" if low >= 2**size else f"{low} to {2**size}"
            table.add_row(label, f"{count:,}", f"{bar} {_percent(count, self.totals.records)}")
        return table

    def _fault_table(self) -> Table:
        caption = Text(f"Listed one by one in {self.path}", "table.caption")
        table = Table("kind", Column("number", justify="right"), "meaning", title="Faults", caption=caption)
        for kind, number in self.counts.items():
            table.add_row(kind, f"{number:,}{' (allowed)' if kind in self.allowed else ''}", KINDS[kind])
        return table


class _Findings(Dataset[Any]):
    """What a function finds in each of some items."""

    def __init__(self, inspect: Callable[[Any], Any], items: Sequence[Any]):
        self._inspect = inspect
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._inspect(self._items[index])


def check_dataset(
    source: Source, encoder: Encoder, out: Path, *, workers: int | None = None, allow: Sequence[str] = ()
) -> CheckReport:
    """Checks the training records of a source with all their images.

    Writes `bad.jsonl` (one fault per line and record) and `report.json` into `out`.

    Args:
        encoder: tokenizer and length limits of the planned training.
        out: folder for the results.
        workers: processes; None takes all cores, 1 works in this one.
        allow: kinds of faults (`validators.KINDS`) that are reported but do not count as failure.

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
    workers = workers or os.cpu_count() or 1
    entries = records.column("entry").tolist()
    faults = [Fault(f["kind"], f["entry"], f["id"], f["detail"]) for f in records.refused("refuse")]
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
    totals = Totals(with_image=int(records.has_image.sum()))
    for row, text in enumerate(_inspected("records", _Findings(TextInspector(encoder), records), workers)):
        totals.add_text(text)
        faults += [Fault(kind, entries[row], ids[row], detail) for kind, detail in text.faults]
    found = _inspected("images", _Findings(partial(inspect_image, images), list(shown_by)), workers)
    for (name, rows), image in zip(shown_by.items(), found, strict=True):
        totals.add_image(image)
        if image.kind is not None:
            faults += [Fault(image.kind, entries[row], ids[row], image.detail, name) for row in rows]
    faults.sort(key=lambda fault: (fault.entry, list(KINDS).index(fault.kind)))
    report = CheckReport(records.data_hash, totals, faults, tuple(allow), out / "bad.jsonl")
    report.path.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in faults), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report


def _inspected(what: str, findings: _Findings, workers: int) -> Iterator[Any]:
    """The findings in order, with a progress bar."""
    loader = DataLoader(findings, batch_size=64, num_workers=workers if workers > 1 else 0, collate_fn=list)
    items = (item for batch in loader for item in batch)
    yield from track(items, what, total=len(findings), console=Console(stderr=True))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
