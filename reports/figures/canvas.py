"""A figure in the paper's form: axes over sequence length, room for labels at the right, a caption below."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from reports.figures.style import COLUMN_IN, FAINT, INK, LEADER, SAVED_DPI, Look

CAPTION_PT = 5.0
CAPTION_MARGIN_IN = 0.1
LONGEST_WORD = 60
LEFT_IN, TOP_IN, AXIS_IN = 0.49, 0.24, 0.34
LABEL_GAP_PT = 5.0
LABEL_IN = 1.15


def slug(text: str) -> str:
    """`text` fit for an XML id: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def text_size_in(text: str, points: float) -> tuple[float, float]:
    """Width and height of a text in inches, from a canvas of its own."""
    figure = Figure(figsize=(1, 1), dpi=72)
    canvas = FigureCanvasAgg(figure)
    box = figure.text(0, 0, text, fontsize=points).get_window_extent(canvas.get_renderer())
    return box.width / 72, box.height / 72


def elided(name: str, points: float = 6, room_in: float = LABEL_IN) -> str:
    """`name`, its middle replaced by an ellipsis if it would not fit beside the axes."""
    keep = len(name)
    shown = name
    while text_size_in(shown, points)[0] > room_in and keep > 4:
        keep -= 1
        shown = name[: keep // 2] + "…" + name[len(name) - (keep - keep // 2) :]
    return shown


def wrap_caption(caption: str, width_in: float) -> list[str]:
    """The caption in lines that fit a figure of `width_in` inches, by measured width."""
    room = width_in - CAPTION_MARGIN_IN
    space = text_size_in("a a", CAPTION_PT)[0] - text_size_in("aa", CAPTION_PT)[0]
    lines: list[str] = []
    used = room
    for word in re.sub(r"(?<=\d) (?=%)", "\u00a0", caption).split(" "):
        for piece in textwrap.wrap(word, LONGEST_WORD):
            width = text_size_in(piece, CAPTION_PT)[0]
            if not lines or used + space + width > room:
                lines.append(piece)
                used = width
            else:
                lines[-1] += " " + piece
                used += space + width
    return lines or [""]


def new_figure(
    title: str, caption: str, labels: Sequence[str], plot_height_in: float = 1.75, width_in: float = COLUMN_IN
) -> tuple[Figure, Axes]:
    """One pair of axes in a figure of `width_in` inches. `labels` are the texts that will stand right of them.

    A figure over both columns is higher as well, in the proportion of the square root of its width.
    """
    lines = wrap_caption(caption, width_in)
    caption_in = 0.085 * len(lines) + 0.05
    label_in = max((text_size_in(elided(label), 6)[0] for label in labels), default=0.0)
    right_in = label_in + LABEL_GAP_PT / 72 + 0.06
    plot_height_in *= math.sqrt(width_in / COLUMN_IN)
    plot_height_in = max(plot_height_in, 0.125 * len(labels) + 0.2)
    height = TOP_IN + plot_height_in + AXIS_IN + caption_in
    figure = Figure(figsize=(width_in, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (
            LEFT_IN / width_in,
            (AXIS_IN + caption_in) / height,
            (width_in - LEFT_IN - right_in) / width_in,
            plot_height_in / height,
        )
    )
    put_title(figure, axes, title)
    figure.text(
        0.04 / width_in, 0.03 / height, "\n".join(lines), fontsize=CAPTION_PT, color=FAINT,
        va="bottom", ha="left", linespacing=1.15, gid="caption",
    )  # fmt: skip
    return figure, axes


def put_title(figure: Figure, axes: Axes, title: str) -> None:
    """The title from the figure's left edge on, in smaller letters where it would leave the right one."""
    across = figure.get_figwidth()
    text = axes.set_title(title, x=-(LEFT_IN - 0.04) / (axes.get_position().width * across))
    font = text.get_fontproperties()
    # Letters are as wide as in the saved picture only at its resolution.
    sheet = Figure(figsize=(1, 1), dpi=SAVED_DPI)
    box = sheet.text(0, 0, title, fontproperties=font).get_window_extent(
        FigureCanvasAgg(sheet).get_renderer()
    )
    text.set_fontsize(font.get_size_in_points() * min(1.0, (across - 0.08) * SAVED_DPI / box.width))


def length_axis(axes: Axes, lengths: Sequence[int], room_at_right: bool = False) -> None:
    """A log2 axis with a tick at each measured length, labels thinned out where they would touch.

    `room_at_right` leaves space behind the longest length, where failed series are hatched. Margins are shares of what
    is measured, so that the few near lengths of a boundary search fill the axis too.
    """
    axes.set_xscale("log", base=2)
    measured = max(lengths) / min(lengths)
    left = min(1.07, measured**0.12) if measured > 1 else 1.07
    right = min(1.16, measured**0.3) if measured > 1 else 1.16
    axes.set_xlim(min(lengths) / left, max(lengths) * (right if room_at_right else left))
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    kept = _thinned(axes, sorted(set(lengths)))
    axes.set_xticks(sorted(set(lengths)), [str(n) if n in kept else "" for n in sorted(set(lengths))])
    axes.set_xlabel("sequence length (tokens, log scale)", labelpad=2)


def _thinned(axes: Axes, lengths: Sequence[int]) -> set[int]:
    """Lengths whose labels fit side by side; the longest first, since it matters most."""
    kept: list[tuple[float, float]] = []
    chosen = set()
    for n in reversed(lengths):
        centre = axes.transData.transform((n, 0))[0]
        half = text_size_in(str(n), 6)[0] * axes.figure.dpi / 2 + 2
        if all(centre + half < lo or centre - half > hi for lo, hi in kept):
            kept.append((centre - half, centre + half))
            chosen.add(n)
    return chosen


def spread_apart(wanted: Sequence[float], size: float, low: float, high: float) -> list[float]:
    """Positions as near to `wanted` as they can be with `size` between neighbours, within [low, high].

    Neighbours that would touch form a block around the mean of their wishes; blocks that touch merge.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, list[int]]] = []

    def centre(members: list[int]) -> float:
        mean = sum(wanted[i] for i in members) / len(members)
        half = size * (len(members) - 1) / 2
        return min(max(mean, low + half), max(high - half, low + half))

    for i in order:
        members = [i]
        while blocks and centre(members) - blocks[-1][0] < size * (len(members) + len(blocks[-1][1])) / 2:
            members = blocks.pop()[1] + members
        blocks.append((centre(members), members))
    result = [0.0] * len(wanted)
    for middle, members in blocks:
        for rank, i in enumerate(members):
            result[i] = middle + size * (rank - (len(members) - 1) / 2)
    return result


def label_series(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names right of the axes at their series' last points: (name, x, y in data, colour), never overlapping.

    A name that had to move, or whose series ends early, gets a pale dotted line to its point,
    which no reader can take for data.
    """
    if not ends:
        return
    figure = axes.figure
    point = figure.dpi / 72
    frame = axes.get_window_extent()
    places = [axes.transData.transform((x, y)) for _, x, y, _ in ends]
    size = 8.0 * point
    ys = spread_apart([place[1] for place in places], size, frame.y0 + size / 2, frame.y1 - size / 2)
    for (name, x, y, colour), place, label_y in zip(ends, places, ys, strict=True):
        moved = abs(label_y - place[1]) > 1.5 * point or frame.x1 - place[0] > 14 * point
        axes.annotate(
            elided(name), (x, y), textcoords="axes fraction",
            xytext=(1 + LABEL_GAP_PT * point / frame.width, (label_y - frame.y0) / frame.height),
            fontsize=6, color=colour, va="center", ha="left", annotation_clip=False, gid=slug(f"label-{name}"),
            arrowprops={"arrowstyle": "-", "lw": 0.6, "ls": (0, (1, 1.6)), "color": LEADER, "zorder": 1, "shrinkA": 1, "shrinkB": 2.5,
                        "relpos": (0, 0.5)}
            if moved else None,
        )  # fmt: skip


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes intersect by more than half a pixel each way, and texts over the side edges."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = set()  # labels of ticks outside the limits exist but are not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            outside = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
            hidden |= {label for tick in outside for label in (tick.label1, tick.label2)}
    # Text's own extent: an annotation's would include the line to its point.
    boxes = [
        (text.get_text(), Text.get_window_extent(text, renderer))
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_text().strip() and text.get_visible() and text not in hidden
    ]
    frame = figure.bbox.padded(0.5)
    outside_frame = [
        (name, "the edge")
        for name, box in boxes
        if not frame.containsx(box.x0) or not frame.containsx(box.x1)
    ]
    return outside_frame + [
        (a, b)
        for i, (a, first) in enumerate(boxes)
        for b, second in boxes[i + 1 :]
        if min(first.x1, second.x1) - max(first.x0, second.x0) > 0.5
        and min(first.y1, second.y1) - max(first.y0, second.y0) > 0.5
    ]


def marker_style(look: Look, hollow: bool, paper: str) -> dict[str, Any]:
    """Keyword arguments of a marker: filled, or hollow where the point is doubtful."""
    return {
        "marker": look.marker,
        "markerfacecolor": paper if hollow else look.colour,
        "markeredgecolor": look.colour,
        "linestyle": "none",
    }


def ink_label(axes: Axes, text: str) -> None:
    """The quantity and unit of the y axis."""
    axes.set_ylabel(text, labelpad=3, color=INK)
