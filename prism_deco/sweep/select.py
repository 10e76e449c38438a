"""Chooses settings by the results of an earlier part, for example the best learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from prism_deco.errors import UsageError
from prism_deco.stages import final_config
from prism_deco.sweep.expand import SweepCell, settings_of
from prism_deco.sweep.ledger import Ledger
from prism_deco.training.progress import VAL_LOSS, read_metrics

ENDED = ("done", "failed", "out_of_memory")
"""States of cells that will not run again."""


def settle(cells: Sequence[SweepCell], ledger: Ledger) -> list[SweepCell]:
    """Fills in every setting that can be chosen by now.

    The value is that of the source part's cells with the lowest `val/loss` at their last validation, averaged over
    seeds. Only cells count that agree with the choosing cell in all other settings that vary within the source part, so
    that each projector gets its own best learning rate. Values already chosen in the ledger stay.

    Raises:
        UsageError: no cell of the source part agrees with the choosing cell, or none of these succeeded.
    """
    return [_settle(cell, cells, ledger) if cell.waits else cell for cell in cells]


def _settle(cell: SweepCell, cells: Sequence[SweepCell], ledger: Ledger) -> SweepCell:
    before = settings_of(ledger.entries[cell.id].overrides)
    overrides = cell.overrides
    for key, part in cell.choose.items():
        # A value in the ledger was chosen before, by this or an earlier driver.
        value = before.get(key) or _choose(cell, key, [other for other in cells if other.part == part], ledger)
        if value is None:
            return cell
        overrides = (*overrides, f"{key}={value}")
    return replace(cell, overrides=overrides, config=final_config(overrides))


def _choose(cell: SweepCell, key: str, part: Sequence[SweepCell], ledger: Ledger) -> str | None:
    """The best value; None while cells that decide it have not ended."""
    # What varies within the source part, besides the value to choose and the seed: the choosing cell must agree in it.
    others = {name for other in part for name in other.settings} - {key, "seed"}
    varied = [name for name in others if len({other.settings.get(name) for other in part}) > 1]
    alike = [other for other in part if all(other.settings.get(n) == cell.settings.get(n) for n in varied)]
    if not alike:
        raise UsageError(
            f"{cell.id} chooses {key} by the results of {cell.choose[key]}, which has no cell of the same "
            f"{', '.join(sorted(varied))}."
        )
    if any(ledger.entries[other.id].state not in ENDED for other in alike):
        return None
    losses: dict[str, list[float]] = {}
    for other in alike:
        if ledger.entries[other.id].state == "done":
            losses.setdefault(other.settings[key], []).append(_last_loss(ledger.folder / other.id))
    if not losses:
        names = ", ".join(other.id for other in alike)
        raise UsageError(f"{cell.id} cannot choose {key}: none of {names} has succeeded. Fix them, then continue.")
    # The value with the lowest mean over the cells that are done, one per seed.
    return min(losses, key=lambda value: fmean(losses[value]))


def _last_loss(run: Path) -> float:
    validated = [row[VAL_LOSS] for row in read_metrics(run) if VAL_LOSS in row]
    if not validated:
        raise UsageError(f"{run} has no {VAL_LOSS} to choose by: its data has no validation records.")
    return validated[-1] if math.isfinite(validated[-1]) else math.inf  # nan would compare as neither worse nor better
