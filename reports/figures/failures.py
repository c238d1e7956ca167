"""Where series end: a lane at the top of the axes for each that failed, from its first failing length on.

A lane is hatched in the series' colour and begins with a ✕ (out of memory) or a ▽ (another ending), so that
several series that fail at the same length stay apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.transforms import blended_transform_factory

from reports.cells import NOT_RUN, Cell
from reports.figures.canvas import elided, slug, text_size_in
from reports.figures.style import PAPER, Look

LANE_PT = 8.0
MEMORY_MARKER, OTHER_MARKER = "x", "v"


@dataclass(frozen=True)
class Failure:
    """The first failing length of a series and how it ended. `closed` is False where a longer one passed."""

    series: str
    seq_len: int
    out_of_memory: bool
    text: str
    closed: bool


def first_failures(groups: Mapping[str, Sequence[Cell]]) -> list[Failure]:
    """One for each series that failed, in the order of the series."""
    found = []
    for series, group in groups.items():
        failed = [cell for cell in group if not cell.outcome.is_ok and cell.outcome not in NOT_RUN]
        if not failed:
            continue
        first = failed[0]
        memory = first.outcome.is_memory
        longest_ok = max((cell.seq_len for cell in group if cell.outcome.is_ok), default=0)
        text = f"{elided(series, 5.5)}: " + (
            "out of memory" if memory else first.outcome.value.replace("_", " ")
        )
        found.append(Failure(series, first.seq_len, memory, text, longest_ok < first.seq_len))
    return found


def lanes_height(axes: Axes, failures: Sequence[Failure]) -> float:
    """Share of the axes' height that the lanes take."""
    height_pt = axes.get_window_extent().height * 72 / axes.figure.dpi
    return (LANE_PT * len(failures) + 2) / height_pt if failures else 0.0


def draw_lanes(axes: Axes, failures: Sequence[Failure], styles: Mapping[str, Look]) -> None:
    """Draw the lanes below the top edge. The x axis must have its limits."""
    across = blended_transform_factory(axes.transData, axes.transAxes)
    height_pt = axes.get_window_extent().height * 72 / axes.figure.dpi
    right = axes.get_xlim()[1]
    for rank, failure in enumerate(failures):
        look = styles[failure.series]
        top = 1 - LANE_PT * rank / height_pt
        bottom = top - (LANE_PT - 1.5) / height_pt
        middle = (top + bottom) / 2
        if failure.closed:
            zone = Rectangle(
                (failure.seq_len, bottom), right - failure.seq_len, top - bottom, transform=across,
                facecolor="none", edgecolor=look.colour, hatch="//////", linewidth=0, alpha=0.55,
                gid=slug(f"zone-{failure.series}-{failure.seq_len}"),
            )  # fmt: skip
            axes.add_patch(zone)
        kind = "oom" if failure.out_of_memory else "failed"
        axes.plot(
            [failure.seq_len], [middle], transform=across, linestyle="none", color=look.colour,
            marker=MEMORY_MARKER if failure.out_of_memory else OTHER_MARKER, markersize=4.2, markeredgewidth=1.3,
            zorder=5, clip_on=False, gid=slug(f"{kind}-{failure.series}-{failure.seq_len}"),
        )  # fmt: skip
        _lane_text(axes, failure, middle, look)


def _lane_text(axes: Axes, failure: Failure, middle: float, look: Look) -> None:
    """Left of the mark where there is room, else right of it, on the hatching."""
    across = blended_transform_factory(axes.transData, axes.transAxes)
    frame = axes.get_window_extent()
    room_in = (axes.transData.transform((failure.seq_len, 0))[0] - frame.x0) / axes.figure.dpi
    left = text_size_in(failure.text, 5.5)[0] + 0.08 < room_in
    axes.annotate(
        failure.text, (failure.seq_len, middle), xycoords=across, xytext=(-4 if left else 5, 0),
        textcoords="offset points", fontsize=5.5, color=look.colour, va="center_baseline", zorder=6,
        ha="right" if left else "left", annotation_clip=False,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4},
    )  # fmt: skip
