"""Figures of one quantity against sequence length, a line for each series."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from megafold_bench.outcomes import Outcome
from reports.cells import Cell, by_series
from reports.figures.canvas import (
    ink_label,
    label_series,
    length_axis,
    marker_style,
    new_figure,
    slug,
    text_size_in,
)
from reports.figures.failures import Failure, draw_lanes, first_failures, lanes_height
from reports.figures.style import COLUMN_IN, FAINT, PAPER, PUBLISHED, SOLID, Look, looks

PUBLISHED_MARKERS = ("+", "x", "1", "d", "s")

Getter = Callable[[Cell], "Estimate | None"]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; without one the ends are None."""

    value: float
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Overlay:
    """A published series: tokens to values."""

    label: str
    values: Mapping[int, float]


@dataclass(frozen=True)
class Quantity:
    """What a figure shows. `per_unit` is how many stored units make one on the axis.

    `light` is a second value drawn as a thin pale line; `rules` are horizontal lines with their texts;
    `unit_label` is the y label.
    """

    title: str
    unit_label: str
    get: Getter
    per_unit: float
    light: Getter | None = None
    rules: Sequence[tuple[float, str]] = field(default=())
    overlays: Sequence[Overlay] = field(default=())


def line_figure(
    quantity: Quantity, found: Sequence[Cell], caption: str, width_in: float = COLUMN_IN
) -> Figure:
    """Draw `quantity`. Series that failed get a lane at the top; flagged points are hollow."""
    groups = by_series(found)
    styles = looks(list(groups))
    failures = first_failures(groups)
    drawn = {name: [c for c in group if quantity.get(c) is not None] for name, group in groups.items()}
    labels = [name for name, group in drawn.items() if group] + [o.label for o in quantity.overlays]
    figure, axes = new_figure(quantity.title, caption, labels, 1.75 + 0.1 * len(failures), width_in)
    lengths = [c.seq_len for c in found] + [n for o in quantity.overlays for n in o.values]
    length_axis(axes, lengths, bool(failures))
    ink_label(axes, quantity.unit_label)
    _scale_y(axes, quantity, drawn, failures)
    ends = _draw_overlays(axes, quantity)
    for name, group in drawn.items():
        if group:
            ends.insert(len(ends) - len(quantity.overlays), _draw_series(axes, quantity, group, styles[name]))
    _draw_rules(axes, quantity, drawn)
    draw_lanes(axes, failures, styles)
    if not any(drawn.values()) and not quantity.overlays:
        axes.set_yticks([])
        axes.text(0.5, 0.35, "no point finished", transform=axes.transAxes, ha="center", color=FAINT)
    label_series(axes, ends)
    return figure


def _scale_y(
    axes: Axes, quantity: Quantity, drawn: Mapping[str, Sequence[Cell]], failures: Sequence[Failure]
) -> None:
    values = [rule for rule, _ in quantity.rules]
    for group in drawn.values():
        for cell in group:
            estimate = quantity.get(cell)
            if estimate is not None:
                values.append(max(estimate.value, estimate.hi or estimate.value))
    values += [value for overlay in quantity.overlays for value in overlay.values.values()]
    top = max(values, default=1.0) / quantity.per_unit
    axes.set_ylim(0, (top or 1.0) * 1.05 / (1 - lanes_height(axes, failures)))


def _draw_series(
    axes: Axes, quantity: Quantity, group: Sequence[Cell], look: Look
) -> tuple[str, float, float, str]:
    """Line, band, markers. A point under allocator pressure is marked but not joined to the line.

    Returns where its name belongs.
    """
    scale = quantity.per_unit
    joined = [cell for cell in group if cell.outcome is not Outcome.OK_PRESSURE]
    points = [(cell.seq_len, _need(quantity.get(cell))) for cell in joined]
    xs = [n for n, _ in points]
    axes.plot(xs, [e.value / scale for _, e in points], color=look.colour, linestyle=look.dash, zorder=3)
    banded = [(n, e) for n, e in points if e.lo is not None and e.hi is not None]
    if len(banded) > 1:
        axes.fill_between(
            [n for n, _ in banded], [(e.lo or 0) / scale for _, e in banded], [(e.hi or 0) / scale for _, e in banded],
            color=look.colour, alpha=0.18, linewidth=0, zorder=2,
        )  # fmt: skip
    for cell in group:
        estimate = _need(quantity.get(cell))
        if estimate.lo is not None and estimate.hi is not None:
            axes.plot([cell.seq_len] * 2, [estimate.lo / scale, estimate.hi / scale], color=look.colour,
                      linewidth=0.7, solid_capstyle="butt", zorder=3)  # fmt: skip
        hollow = cell.doubtful or cell.outcome is Outcome.OK_PRESSURE
        axes.plot([cell.seq_len], [estimate.value / scale], zorder=4, **marker_style(look, hollow, PAPER),
                  gid=slug(f"{'flagged' if hollow else 'point'}-{cell.series}-{cell.seq_len}"))  # fmt: skip
    if quantity.light is not None:
        light = [(cell.seq_len, quantity.light(cell)) for cell in joined]
        axes.plot([n for n, e in light if e], [e.value / scale for _, e in light if e], color=look.colour,
                  linestyle=SOLID, linewidth=0.7, marker="_", markersize=4.5, alpha=0.5, zorder=2)  # fmt: skip
    last = group[-1]
    return last.series, last.seq_len, _need(quantity.get(last)).value / scale, look.colour


def _need(estimate: Estimate | None) -> Estimate:
    if estimate is None:
        raise ValueError("a cell without this quantity cannot be drawn")
    return estimate


def _draw_overlays(axes: Axes, quantity: Quantity) -> list[tuple[str, float, float, str]]:
    """Published series: grey, dotted, each with a small open mark of its own."""
    ends = []
    for overlay, marker in zip(quantity.overlays, cycle(PUBLISHED_MARKERS)):
        xs = sorted(overlay.values)
        ys = [overlay.values[n] / quantity.per_unit for n in xs]
        axes.plot(xs, ys, color=PUBLISHED, linestyle=(0, (1, 1.3)), linewidth=0.9, marker=marker, markersize=3.2,
                  markeredgewidth=0.7, markerfacecolor=PAPER, zorder=2, gid=slug(f"published-{overlay.label}"))  # fmt: skip
        ends.append((overlay.label, float(xs[-1]), ys[-1], PUBLISHED))
    return ends


RULE_TEXT_PT = 5.5
CLEAR_PT = 4.0
"""From the middle of a marker to what stays clear of it."""


def _draw_rules(axes: Axes, quantity: Quantity, drawn: Mapping[str, Sequence[Cell]]) -> None:
    """Horizontal lines, their texts at the first end and side where no marker is in the way."""
    side = blended_transform_factory(axes.transAxes, axes.transData)
    scale = quantity.per_unit
    points = [(c.seq_len, _need(quantity.get(c)).value / scale) for group in drawn.values() for c in group]
    points += [(n, value / scale) for overlay in quantity.overlays for n, value in overlay.values.items()]
    for value, text in quantity.rules:
        height = value / scale
        axes.axhline(height, color=FAINT, linewidth=0.8, zorder=1.5, gid="capacity")
        at_right, above = _free_place(axes, height, text, points)
        axes.annotate(text, (float(at_right), height), xycoords=side, xytext=(-2 if at_right else 2, 1.5 if above else -1.5),
                      textcoords="offset points", fontsize=RULE_TEXT_PT, color=FAINT,
                      va="bottom" if above else "top", ha="right" if at_right else "left")  # fmt: skip


def _free_place(
    axes: Axes, height: float, text: str, points: Sequence[tuple[float, float]]
) -> tuple[bool, bool]:
    """Whether a rule's text stands at the right end, and above: the first place that no point touches."""
    frame, per_inch = axes.get_window_extent(), axes.figure.dpi
    wide, high = (length * per_inch for length in text_size_in(text, RULE_TEXT_PT))
    clear = CLEAR_PT * per_inch / 72
    rule = axes.transData.transform((points[0][0] if points else 1.0, height))[1]
    pixels = [axes.transData.transform(point) for point in points]
    places = [(False, False), (True, False), (False, True), (True, True)]
    for at_right, above in places:
        left = frame.x1 - wide - clear if at_right else frame.x0
        bottom = rule if above else rule - high - clear
        touched = any(
            left - clear < x < left + wide + clear and bottom - clear < y < bottom + high + clear
            for x, y in pixels
        )
        if not touched:
            return at_right, above
    return places[0]
