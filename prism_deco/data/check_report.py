"""What a check of a data set found: totals, faults, and how they are shown."""

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
    """Sums over some records and images; sums of such sums are sums again.

    Attributes:
        lengths: records per length class: class k holds up to 2^k tokens of text, and more than 2^(k-1).
        formats: images per file format.
        image_hash: sum of the images' SHA-256 modulo 2^256: their order does not matter.
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
        """Counts what another part of the data set came to."""
        for name, value in vars(other).items():
            # max and modulo are no sums; counters are added key by key.
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest" else mine + value)
        self.image_hash %= _HASH_SPACE

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return vars(self) | {"image_hash": f"{self.image_hash:064x}"}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Totals:
        """What `to_json` wrote."""
        lengths = Counter({int(key): value for key, value in content["lengths"].items()})
        formats, image_hash = Counter(content["formats"]), int(content["image_hash"], 16)
        return cls(**content | {"lengths": lengths, "formats": formats, "image_hash": image_hash})


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        data_hash: SHA-256 of the records' file.
        totals: sums over the usable records; every image file counts once.
        faults: all faults, by position in the file.
        allowed: kinds that are reported but do not count as failure.
        path: where `bad.jsonl` lies.
    """

    data_hash: str
    totals: Totals
    faults: Sequence[Fault]
    allowed: Sequence[str]
    path: Path

    @property
    def exit_status(self) -> int:
        """0 when nothing is wrong that is not allowed, else 1."""
        return int(any(fault.kind not in self.allowed for fault in self.faults))

    @property
    def counts(self) -> dict[str, int]:
        """Faults per kind."""
        found = Counter(fault.kind for fault in self.faults)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def to_json(self) -> dict[str, Any]:
        """The report without the single faults, which are in `bad.jsonl`."""
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
            "with an image": f"{t.with_image:,}",
            "text only": f"{t.records - t.with_image:,}",
            "image files": f"{t.images:,} ({t.image_bytes / 1e9:.3f} GB)",
            "of these": ", ".join(f"{n:,} {name}" for name, n in t.formats.most_common()) or "none readable",
            "tokens of text": f"{t.tokens:,}, longest record {t.longest:,}",
            "supervised": f"{_share(t.supervised - t.supervised_cut, kept)} of what is kept",
            "cut by truncation": f"{t.tokens_cut:,} tokens of {t.records_cut:,} records",
            "supervised among these": f"{t.supervised_cut:,}",
            "hash of the records": self.data_hash,
            "hash of the images": f"{t.image_hash:064x}",
        }
        for row in rows.items():
            table.add_row(*row)
        return table

    def _histogram(self) -> Table:
        table = Table(title="Length of the records")
        table.add_column("tokens of text", justify="right")
        table.add_column("records", justify="right")
        table.add_column("share")
        for size in range(min(self.totals.lengths, default=0), max(self.totals.lengths, default=-1) + 1):
            count = self.totals.lengths[size]
            bar = "█" * round(40 * count / max(self.totals.lengths.values()))
            low = 2 ** (size - 1) + 1 if size > 1 else size + 1
            label = f"{low}" if low >= 2**size else f"{low} to {2**size}"
            table.add_row(label, f"{count:,}", f"{bar} {_share(count, self.totals.records)}")
        return table

    def _fault_table(self) -> Table:
        table = Table(title="Faults", caption=Text(f"Each of them is in {self.path}", "table.caption"))
        table.add_column("kind")
        table.add_column("number", justify="right")
        table.add_column("what it is")
        for kind, number in self.counts.items():
            table.add_row(kind, f"{number:,}{' (allowed)' if kind in self.allowed else ''}", KINDS[kind])
        return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
