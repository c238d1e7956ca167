"""Every step time of a run, as deviation from the median of its point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from reports.cells import Cell, by_series
from reports.figures.canvas import LABEL_GAP_PT, elided, ink_label, new_figure
from reports.figures.style import COLUMN_IN, FAINT, INK, looks

FEW_STEPS = 30
LEAST_RANGE = 1.0
"""Per cent that the axis shows at least on either side."""


def distribution_figure(found: Sequence[Cell], caption: str, width_in: float = COLUMN_IN) -> Figure:
    """A dot for each step of each process in the order they ran, a bar from quartile to quartile."""
    groups = by_series(found)
    styles = looks(list(groups))
    series = [name for name, group in groups.items() if any(cell.time for cell in group)]
    figure, axes = new_figure("Step-time distribution", caption, series, width_in=width_in)
    axes.set_xlabel("sequence length (tokens)", labelpad=2)
    ink_label(axes, "step time against median (%)")
    lengths = sorted({cell.seq_len for cell in found if cell.time})
    if not lengths:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.35, "no point finished", transform=axes.transAxes, ha="center", color=FAINT)
        return figure
    slot = 0.8 / len(series)
    for rank, name in enumerate(series):
        for cell in groups[name]:
            if cell.time is None:
                continue
            steps = np.concatenate([np.asarray(process) for process in cell.time.processes])
            centre = lengths.index(cell.seq_len) + (rank - (len(series) - 1) / 2) * slot
            spread = np.linspace(-0.38, 0.38, steps.size) * slot if steps.size > 1 else np.zeros(1)
            few = steps.size <= FEW_STEPS
            look, median = styles[name], cell.time.median
            axes.plot(centre + spread, 100 * (steps / median - 1), linestyle="none", marker=".", markersize=4.5 if few else 1.8,
                      markeredgewidth=0, color=look.colour, alpha=0.7 if few else 0.4)  # fmt: skip
            axes.plot([centre] * 2, [100 * (q / median - 1) for q in (cell.time.q1, cell.time.q3)],
                      color=look.colour, linewidth=2.2, alpha=0.55, solid_capstyle="butt")  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.5, zorder=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -LEAST_RANGE), max(high, LEAST_RANGE))  # no spread is not shown as a great one
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.tick_params(axis="x", length=0)
    for rank, name in enumerate(series):
        axes.annotate(elided(name), (1, 1), xycoords="axes fraction", xytext=(LABEL_GAP_PT, -4 - 8 * rank),
                      textcoords="offset points", fontsize=6, color=styles[name].colour, va="center",
                      annotation_clip=False)  # fmt: skip
    return figure
