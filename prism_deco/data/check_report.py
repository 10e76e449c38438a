"""What a check of a data set found: totals and faults, and how they are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from prism_deco.data.validators import KINDS, Fault, ImageFindings, TextFindings

_HASH_SPACE = 2**256


@dataclass
class Totals:
    """Sums over some records and images, which can be added up.

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

    def add_text(self, found: TextFindings, *, has_image: bool) -> None:
        """Counts one record."""
        self.records += 1
        self.with_image += has_image
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
            self.image_hash = (self.image_hash + int(found.digest, 16)) % _HASH_SPACE

    def add(self, other: Totals) -> None:
        """Adds the sums over another part of the data set."""
        for name, value in vars(other).items():
            mine = getattr(self, name)  # a number, or a counter, which adds up by key
            setattr(self, name, max(mine, value) if name == "longest" else mine + value)
        self.image_hash %= _HASH_SPACE

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON values."""
        return vars(self) | {"image_hash": f"{self.image_hash:064x}"}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Totals:
        """Reads what `to_json` returned."""
        parsed = {
            "lengths": Counter({int(key): value for key, value in content["lengths"].items()}),
            "formats": Counter(content["formats"]),
            "image_hash": int(content["image_hash"], 16),
        }
        return cls(**content | parsed)


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        data_hash: SHA-256 of the records' file.
        totals: sums over the records; each image counts once.
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
        return {"data_hash": self.data_hash, "faults": self.counts, **self.totals.to_json()}

    def render(self) -> Group:
        """The report as tables of rich."""
        parts: list[Any] = [self._overview(), self._histogram()]
        if self.faults:
            parts.append(self._fault_table())
        return Group(*parts)

    def _overview(self) -> Table:
        t = self.totals
        kept = t.tokens - t.tokens_cut
        table = Table(title="Data set", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        rows = {
            "usable records": f"{t.records:,}",
            "with images": f"{t.with_image:,}",
            "text only": f"{t.records - t.with_image:,}",
            "image files": f"{t.images:,} ({t.image_bytes / 1e9:.3f} GB)",
            "formats": ", ".join(f"{n:,} {name}" for name, n in t.formats.most_common()) or "none readable",
            "text tokens": f"{t.tokens:,}, longest record {t.longest:,}",
            "supervised": f"{_percent(t.supervised - t.supervised_cut, kept)} of those kept",
            "truncated": f"{t.tokens_cut:,} tokens of {t.records_cut:,} records",
            "supervised among these": f"{t.supervised_cut:,}",
            "hash of the records": self.data_hash,
            "hash of the images": f"{t.image_hash:064x}",
        }
        for row in rows.items():
            table.add_row(*row)
        return table

    def _histogram(self) -> Table:
        table = Table(title="Lengths of the records")
        table.add_column("text tokens", justify="right")
        table.add_column("records", justify="right")
        table.add_column("fraction")
        for size in range(min(self.totals.lengths, default=0), max(self.totals.lengths, default=-1) + 1):
            count = self.totals.lengths[size]
            bar = "█" * round(40 * count / max(self.totals.lengths.values()))
            low = 2 ** (size - 1) + 1 if size > 1 else size + 1
            label = f"{low}" if low >= 2**size else f"{low} to {2**size}"
            table.add_row(label, f"{count:,}", f"{bar} {_percent(count, self.totals.records)}")
        return table

    def _fault_table(self) -> Table:
        table = Table(title="Faults", caption=Text(f"Listed one by one in {self.path}", "table.caption"))
        table.add_column("kind")
        table.add_column("number", justify="right")
        table.add_column("meaning")
        for kind, number in self.counts.items():
            table.add_row(kind, f"{number:,}{' (allowed)' if kind in self.allowed else ''}", KINDS[kind])
        return table


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
