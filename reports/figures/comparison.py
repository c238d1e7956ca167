"""The figure of a comparison: a row for each point, its time ratio with interval, its memory ratio."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from reports.compare import Comparison, Pair
from reports.figures.canvas import CAPTION_PT, elided, slug, text_size_in, wrap_caption
from reports.figures.save import Drawing
from reports.figures.style import COLUMN_IN, FAINT, GRID, INK, PAPER, looks, styled

ROW_IN = 0.125


def comparison_drawing(comparison: Comparison, width_in: float = COLUMN_IN) -> Drawing:
    """Time and memory ratios of every point of a comparison."""
    caption = (
        f"B/A, A = {comparison.name_a}, B = {comparison.name_b}. Bars: 95 % bootstrap interval; filled: a change; "
        f"shaded: ±{100 * comparison.threshold:g} %. {comparison.caption}."
    )
    title = f"{comparison.name_b} against {comparison.name_a}"
    with styled():
        return Drawing("compare", title, caption, _figure(comparison, caption, width_in), comparison.frame())


def _figure(comparison: Comparison, caption: str, width_in: float) -> Figure:
    pairs = comparison.pairs
    lines = wrap_caption(caption, width_in)
    left = min(max(text_size_in(elided(pair.name), 6)[0] for pair in pairs) + 0.12, 1.5)
    plot, below, above = ROW_IN * len(pairs) + 0.1, 0.085 * len(lines) + 0.36, 0.3
    height = above + plot + below
    figure = Figure(figsize=(width_in, height))
    FigureCanvasAgg(figure)
    room = width_in - left - 0.06
    rows = range(len(pairs))
    panels = []
    for column, title in enumerate(("Step time, B/A", "Peak memory, B/A")):
        x = left + column * (room * 0.56 + 0.12)
        width = room * 0.56 if column == 0 else room * 0.44 - 0.12
        axes = figure.add_axes((x / width_in, below / height, width / width_in, plot / height))
        axes.set_title(title, fontsize=6.5)
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.set_yticks(list(rows), [elided(pair.name) for pair in pairs] if column == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=GRID)
        axes.spines["left"].set_visible(False)
        axes.axvspan(
            1 - comparison.threshold, 1 + comparison.threshold, color=GRID, alpha=0.6, zorder=0, linewidth=0
        )
        axes.axvline(1, color=INK, linewidth=0.6, zorder=1)
        panels.append(axes)
    _draw(comparison, *panels)
    figure.text(0.04 / width_in, 0.03 / height, "\n".join(lines), fontsize=CAPTION_PT, color=FAINT,
                va="bottom", ha="left", linespacing=1.15)  # fmt: skip
    return figure


def _draw(comparison: Comparison, time_axes: Axes, memory_axes: Axes) -> None:
    styles = looks(list(dict.fromkeys(pair.b.variant for pair in comparison.pairs)))
    times, memories = [], []
    for row, pair in enumerate(comparison.pairs):
        look = styles[pair.b.variant]
        if pair.time is not None:
            filled = pair.time_change in ("more", "less")
            time_axes.plot(
                [pair.time.lo, pair.time.hi],
                [row, row],
                color=look.colour,
                linewidth=1.2,
                solid_capstyle="butt",
            )
            time_axes.plot([pair.time.estimate], [row], linestyle="none", marker=look.marker, markeredgecolor=look.colour,
                           markerfacecolor=look.colour if filled else PAPER, zorder=3,
                           gid=slug(f"{'change' if filled else 'same'}-{pair.name}"))  # fmt: skip
            times += [pair.time.lo, pair.time.hi]
        else:
            across = blended_transform_factory(time_axes.transAxes, time_axes.transData)
            time_axes.text(0.02, row, _absent(pair), transform=across, fontsize=5.5, color=look.colour,
                           va="center_baseline", bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.3})  # fmt: skip
        if pair.memory is not None:
            filled = pair.memory_change in ("more", "less")
            memory_axes.plot([pair.memory], [row], linestyle="none", marker=look.marker, markeredgecolor=look.colour,
                             markerfacecolor=look.colour if filled else PAPER, zorder=3)  # fmt: skip
            memories.append(pair.memory)
    for axes, values, ticks in ((time_axes, times, 5), (memory_axes, memories, 4)):
        reach = max([abs(value - 1) for value in values] + [1.7 * comparison.threshold])
        low = min([1 - 1.7 * comparison.threshold, *values])
        high = max([1 + 1.7 * comparison.threshold, *values])
        axes.set_xlim(low - 0.08 * reach, high + 0.08 * reach)
        axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))


def _absent(pair: Pair) -> str:
    a, b = pair.a.outcome.value, pair.b.outcome.value
    return a.replace("_", " ") if a == b else f"{a} → {b}".replace("_", " ")
