"""Figures of training: the curves of single cells, and projectors side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from prism_deco.report.cells import TRAIN_LOSS, VAL_LOSS, Curve, RunCell, SeedGroup
from prism_deco.report.grid import ScoreTable
from prism_deco.report.plotting import STEPS, Figure, label_axes, legend, panels, settings, styles, to_svg

_MARKERS = 8  # along a curve


def convergence(table: ScoreTable) -> Figure | None:
    """Training loss against steps: a panel per row, a line per projector (the paper's Figure 5)."""
    groups = [group for group in table.groups if any(_loss(cell) for cell in group.cells)]
    rows = list(dict.fromkeys(group.row for group in groups))
    if not rows:
        return None
    looks = styles(group.variant for group in table.groups)
    with settings():
        figure, axes = panels(len(rows), width=5.0 if len(rows) == 1 else 3.5)
        for row, ax in zip(rows, axes, strict=True):
            for group in groups:
                if group.row == row:
                    _convergence(ax, group, looks[group.variant])
            label_axes(ax, row, STEPS, "training loss (nats per token)")
        legend(figure, axes, looks)
        caption = (
            "Training loss, a running mean over a fortieth of the run; with several seeds their mean, each seed faint."
        )
        return Figure("convergence", to_svg(figure), caption)


def _convergence(ax: Axes, group: SeedGroup, look: dict[str, Any]) -> None:
    smooth = [_smooth(_loss(cell)) for cell in group.cells if _loss(cell)]
    if len(smooth) > 1:
        for x, y in smooth:
            ax.plot(x, y, color=look["color"], alpha=0.3, linewidth=0.7)
    # The mean ends where the shortest curve does.
    steps = np.array(sorted(set().union(*(x.tolist() for x, _ in smooth))))
    steps = steps[steps <= min(x[-1] for x, _ in smooth)]
    mean = np.mean([np.interp(steps, x, y) for x, y in smooth], axis=0)
    ax.plot(steps, mean, label=group.variant, markevery=max(1, len(steps) // _MARKERS), **look)


def cell_curves(cell: RunCell) -> Figure | None:
    """Training and validation loss of one cell."""
    train, val = _loss(cell), cell.curves.get(VAL_LOSS, [])
    if not train and not val:
        return None
    with settings():
        figure, axes = panels(1, width=3.8, height=2.3)
        ax = axes[0]
        if train:
            x, y = np.array(train).T
            ax.plot(x, y, color="#0072B2", linewidth=1.0, label="training")
        if val:
            x, y = np.array(val).T
            ax.plot(x, y, color="#000000", marker="o", linestyle=(0, (4, 2)), label="validation")
        label_axes(ax, cell.id, STEPS, "loss (nats per token)")
        legend(figure, axes)
        return Figure(f"curves-{cell.id.replace('/', '-')}", to_svg(figure), "")


def _loss(cell: RunCell) -> Curve:
    return list(cell.curves.get(TRAIN_LOSS, []))


def _smooth(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the running mean of the values, the window cut at the ends."""
    x, y = np.array(curve).T
    half = len(y) // 80
    means = [y[max(0, k - half) : k + half + 1].mean() for k in range(len(y))]
    return x, np.array(means)
