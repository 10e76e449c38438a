"""What `bench train` found: a row per variant, ratios, a table and JSON."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from prism_deco.bench.measure import Usage
from prism_deco.bench.variants import StepVariant
from prism_deco.vlm import VLM

OURS, PLAIN, GROUPED = "prism_deco", "transformers, padded", "transformers, grouped by length"


@dataclass(frozen=True)
class Agreement:
    """Relative differences between our step and the peer's on the first batch."""

    loss: float
    gradient: float


@dataclass(frozen=True)
class VariantRow:
    """One variant, measured over the pool."""

    name: str
    samples_per_s: float
    """Median over the rounds."""
    tokens_per_s: float
    """Supervised tokens."""
    peak: int | None
    """Largest peak of a step above the static state, bytes."""
    mfu: float
    """Operations that the records need (without padding, logits where supervised) per second, as a share of what
    a large matrix product reaches here."""
    padding: float
    """Share of the positions that is padding."""
    seconds: tuple[float, ...]
    """Each round's wall-clock time."""
    cpu_seconds: tuple[float, ...]
    """Each round's processor time."""


@dataclass(frozen=True)
class TrainReport:
    """All that was measured, and on what."""

    about: dict[str, Any]
    agreement: Agreement
    rows: list[VariantRow]

    def ratio(self, ours: str, peer: str, clock: str = "seconds") -> tuple[float, float, float]:
        """How many times faster `ours` is: the median, least and largest ratio of rounds timed side by side.

        Args:
            clock: seconds | cpu_seconds.
        """
        pairs = zip(getattr(self._row(ours), clock), getattr(self._row(peer), clock), strict=True)
        ratios = [theirs / mine for mine, theirs in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def memory_ratio(self, ours: str, peer: str) -> float | None:
        """`ours` as a share of the peer's peak; None where it could not be measured."""
        mine, theirs = self._row(ours).peak, self._row(peer).peak
        return mine / theirs if mine is not None and theirs else None

    def _row(self, name: str) -> VariantRow:
        return next(row for row in self.rows if row.name == name)

    def write(self, path: Path) -> None:
        """As JSON, with the ratios to every peer."""
        content = asdict(self)
        for row in content["rows"]:
            for peer in (PLAIN, GROUPED):
                row[f"times {peer}"] = self.ratio(row["name"], peer)
                row[f"times {peer}, processor"] = self.ratio(row["name"], peer, "cpu_seconds")
                row[f"memory of {peer}"] = self.memory_ratio(row["name"], peer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def render(report: TrainReport) -> Table:
    """The rows as a table."""
    facts, agreement = report.about, report.agreement
    shape = facts["architecture"]
    title = (
        f"Training steps: {facts['llm']} ({shape['hidden_size']} x {shape['num_hidden_layers']}, vocabulary "
        f"{shape['vocab_size']:,}), {facts['visual_tokens']} visual tokens, batch {facts['batch_size']}, "
        f"{facts['precision']}, {facts['hardware']}, {facts['threads']} threads"
    )
    table = Table(
        title=Text(title, "table.title"),
        caption=f"Losses differ by {agreement.loss:.0e}, gradients by {agreement.gradient:.0e}. Tokens: supervised. "
        "Times: how much faster, median of rounds timed side by side (least-largest), by the clock and, below, by "
        "processor time. MiB: peak of a step above weights, gradients and optimizer.",
    )
    table.add_column("variant")
    for header in ("samples/s", "tokens/s", "MFU", "padding", "times padded", "times grouped", "MiB", "of padded"):
        table.add_column(header, justify="right", no_wrap=header.startswith("times"))
    for row in report.rows:
        share = report.memory_ratio(row.name, PLAIN)
        table.add_row(
            row.name,
            f"{row.samples_per_s:.2f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.mfu:.0%}",
            f"{row.padding:.0%}",
            *(_ratio(report, row.name, peer) for peer in (PLAIN, GROUPED)),
            "-" if row.peak is None else f"{row.peak / 2**20:.0f}",
            "-" if share is None else f"{share:.2f}",
        )
    return table


def _ratio(report: TrainReport, name: str, peer: str) -> str:
    lines = []
    for clock in ("seconds", "cpu_seconds"):
        median, least, largest = report.ratio(name, peer, clock)
        lines.append(f"{median:.2f} ({least:.2f}-{largest:.2f})")
    return "\n".join(lines)


def row(variant: StepVariant, taken: Sequence[Sequence[Usage]], ideal_seconds: float) -> VariantRow:
    """A variant's row.

    Args:
        taken: of each round each step.
        ideal_seconds: what a round would take at the pace of a large matrix product.
    """
    seconds = tuple(sum(step.seconds for step in round_) for round_ in taken)
    median = statistics.median(seconds)
    peaks = [step.peak for round_ in taken for step in round_ if step.peak is not None]
    positions = sum(batch.attention_mask.numel() for batch in variant.batches)
    return VariantRow(
        name=variant.name,
        samples_per_s=sum(len(batch.ids) for batch in variant.batches) / median,
        tokens_per_s=sum(batch.num_targets for batch in variant.batches) / median,
        peak=max(peaks, default=None),
        mfu=ideal_seconds / median,
        padding=1 - sum(int(batch.attention_mask.sum()) for batch in variant.batches) / positions,
        seconds=seconds,
        cpu_seconds=tuple(sum(step.cpu_seconds for step in round_) for round_ in taken),
    )


def about(config: DictConfig, vlm: VLM, ours: StepVariant, steps: int) -> dict[str, Any]:
    """What was measured, and on what.

    Args:
        ours: a variant of packed batches.
    """
    lengths = [length for batch in ours.batches for length in batch.lengths or ()]
    return {
        "hardware": hardware(ours.batches[0].input_ids.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backbone": config.backbone.name,
        "llm": config.llm.name,
        "architecture": OmegaConf.to_container(config.llm.architecture, resolve=True),
        "precision": config.trainer.precision,
        "visual_tokens": vlm.projector.num_tokens,
        "batch_size": len(lengths) // steps,
        "steps": steps,
        "max_text_tokens": config.recipe.max_text_tokens,
        "max_logits": config.recipe.max_logits,
        "mean_length": statistics.mean(lengths),
        "longest": max(lengths),
    }


def hardware(device: torch.device) -> str:
    """The name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
