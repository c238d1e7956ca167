"""Times of every implementation of every operator against length, beside the floor of the counted work."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megafold_bench.errors import UserError
from reports.figures.canvas import (
    AXIS_IN,
    CAPTION_PT,
    LABEL_GAP_PT,
    LEFT_IN,
    elided,
    ink_label,
    label_series,
    length_axis,
    marker_style,
    put_title,
    slug,
    text_size_in,
    wrap_caption,
)
from reports.figures.save import Drawing, save
from reports.figures.style import COLUMN_IN, FAINT, PAPER, Look, looks, styled
from reports.kernel_rows import caption_of, kernel_frame, read_rows

ROW_IN, GAP_IN, TOP_IN = 1.35, 0.62, 0.24
PREFERRED = ("fwdbwd", "bwd", "fwd")
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward and backward"}
FLOOR = "floor"
SAME_AS = {"definition": "pytorch", "compile": "inductor", "ds4sci": "ds-evoformer"}
"""Implementations that look like the variant of a training run that uses them."""


def _panels(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A panel for each operator and dtype: the most inclusive pass that was measured."""
    found = []
    for (op, dtype), group in frame.groupby(["op", "dtype"], sort=False):
        measured = group[group["median_s"].notna()]
        name = next((p for p in PREFERRED if (measured["pass"] == p).any()), None)
        if name is not None:
            title = f"{str(op).replace('_', ' ')}, {dtype}, {PASS_NAMES[name]}"
            found.append((title, measured[measured["pass"] == name].sort_values("tokens")))
    return found


def kernels_drawing(folder: Path) -> Drawing:
    """The figure of a folder; UserError where nothing was measured."""
    rows = read_rows(folder)
    frame = kernel_frame(rows)
    panels = _panels(frame)
    if not panels:
        raise UserError(f"{folder} has no finished measurement: nothing to draw")
    caption = (
        f"{caption_of(rows)}. Median of device-timed repeats, bar: 20th to 80th percentile; hollow: repeats differ "
        "in some bit; grey: least time of the counted FLOPs, bytes and exponentials at the measured ceilings."
    )
    with styled():
        return Drawing("kernels", "Operators", caption, _figure(panels, caption), frame)


def save_kernels_figure(folder: Path) -> list[Path]:
    """Draw a folder's figure into it: SVG, PDF, PNG and the CSV."""
    return save(kernels_drawing(folder), folder)


def _figure(panels: list[tuple[str, pd.DataFrame]], caption: str) -> Figure:
    names = list(dict.fromkeys(name for _, part in panels for name in part["implementation"]))
    chosen = looks([SAME_AS.get(name, name) for name in names])
    styles = {name: chosen[SAME_AS.get(name, name)] for name in names}
    lines = wrap_caption(caption, COLUMN_IN)
    caption_in = 0.085 * len(lines) + 0.05
    label_in = max(text_size_in(elided(name), 6)[0] for name in [*names, FLOOR])
    right_in = label_in + LABEL_GAP_PT / 72 + 0.06
    height = TOP_IN + len(panels) * ROW_IN + (len(panels) - 1) * GAP_IN + AXIS_IN + caption_in
    figure = Figure(figsize=(COLUMN_IN, height))
    FigureCanvasAgg(figure)
    width = COLUMN_IN - LEFT_IN - right_in
    for number, (title, part) in enumerate(panels):
        bottom = height - TOP_IN - ROW_IN - number * (ROW_IN + GAP_IN)
        axes = figure.add_axes((LEFT_IN / COLUMN_IN, bottom / height, width / COLUMN_IN, ROW_IN / height))
        put_title(figure, axes, title)
        _draw(axes, part, styles)
    figure.text(0.04 / COLUMN_IN, 0.03 / height, "\n".join(lines), fontsize=CAPTION_PT, color=FAINT,
                va="bottom", ha="left", linespacing=1.15, gid="caption")  # fmt: skip
    return figure


def _draw(axes: Axes, part: pd.DataFrame, styles: dict[str, Look]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    length_axis(axes, [int(n) for n in part["tokens"]])
    ink_label(axes, "time (ms, log scale)")
    ends: list[tuple[str, float, float, str]] = []
    for name, group in part.groupby("implementation", sort=False):
        look = styles[str(name)]
        xs, ys = group["tokens"].tolist(), (group["median_s"] * 1e3).tolist()
        axes.plot(xs, ys, color=look.colour, linestyle=look.dash, zorder=3)
        for record in group.to_dict("records"):
            low, high = record["p20_s"] * 1e3, record["p80_s"] * 1e3
            axes.plot([record["tokens"]] * 2, [low, high], color=look.colour, linewidth=0.7, zorder=3)
            axes.plot([record["tokens"]], [record["median_s"] * 1e3], zorder=4,
                      gid=slug(f"point-{name}-{record['tokens']}"),
                      **marker_style(look, not record["bitwise"], PAPER))  # fmt: skip
        ends.append((str(name), xs[-1], ys[-1], look.colour))
    floors = part[part["floor_s"].notna()].drop_duplicates("tokens")
    if not floors.empty:
        xs, ys = floors["tokens"].tolist(), (floors["floor_s"] * 1e3).tolist()
        axes.plot(xs, ys, color=FAINT, linewidth=0.8, zorder=1.5, gid=FLOOR)
        ends.append((FLOOR, xs[-1], ys[-1], FAINT))
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.15, high * 1.15)
    label_series(axes, ends)
