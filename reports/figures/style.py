"""How figures look: sizes, fonts, and one colour, marker and dash for each variant, whatever it is drawn beside."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

SAVED_DPI = 300
"""Of a picture in points (PNG)."""
COLUMN_IN = 3.35
"""Width of one column of a two-column paper, inches."""

PAGE_IN = 6.9
"""Width of both columns of a two-column paper, inches."""

WIDTHS_IN = {"column": COLUMN_IN, "page": PAGE_IN}

INK = "#1b1b1f"
FAINT = "#77777f"
GRID = "#e2e2e6"
PAPER = "#ffffff"
PUBLISHED = "#7a7a82"
LEADER = "#c2c2ca"
"""Lines from a name to its point: solid and pale, where data are never both."""

Dash = tuple[float, tuple[float, ...]]
SOLID: Dash = (0, ())


@dataclass(frozen=True)
class Look:
    """Colour, marker and dash pattern of one series."""

    colour: str
    marker: str
    dash: Dash


# Okabe and Ito's colours, darkened where they were too light for thin lines on white. They differ in
# lightness as well as hue, so that they stay apart in grey.
KNOWN = {
    "pytorch": Look("#0060a8", "o", SOLID),
    "inductor": Look("#d98200", "s", (0, (4, 1.4))),
    "megafold": Look("#b3123b", "D", SOLID),
    "ds-evoformer": Look("#7a6a00", "P", (0, (5, 1.2, 1, 1.2))),
    "flex": Look("#00855f", "^", (0, (1.2, 1.2))),
    "cuequivariance": Look("#b35a94", "v", (0, (5, 1.2, 1, 1.2))),
    "trifast": Look("#3a9fd6", "X", (0, (3, 1, 1, 1, 1, 1))),
}
SPARE = (
    Look("#5d3a9b", "<", (0, (6, 2))), Look("#006d77", ">", (0, (2, 1))), Look("#8c510a", "p", (0, (4, 1, 1, 1))),
    Look("#c2547a", "h", (0, (1, 1))), Look("#4d7c0f", "d", SOLID), Look("#44546a", "H", (0, (3, 2))),
    Look("#a03c00", "*", (0, (6, 1, 1, 1))), Look("#7048c6", "8", (0, (2, 2))), Look("#2f5d8a", "P", (0, (5, 2))),
)  # fmt: skip
SERIES_COLOURS = tuple(look.colour for look in (*KNOWN.values(), *SPARE))


def looks(series: Sequence[str]) -> dict[str, Look]:
    """A look for each series: the variant's own where it has one, else one that its name picks.

    Two series of one variant, or two names that pick the same, must differ: the later takes the next
    free look. The same list always gives the same looks.
    """
    chosen: dict[str, Look] = {}
    for name in series:
        look = KNOWN.get(name.split(" · ")[0])
        if look is not None and look not in chosen.values():
            chosen[name] = look
    for name in sorted(set(series) - set(chosen)):
        first = zlib.crc32(name.encode()) % len(SPARE)
        around = [SPARE[(first + i) % len(SPARE)] for i in range(len(SPARE))]
        chosen[name] = next((look for look in around if look not in chosen.values()), around[0])
    return chosen


RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 6.5,
    "axes.labelsize": 6.5,
    "axes.titlesize": 7,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.linewidth": 0.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.4,
    "lines.markeredgewidth": 0.8,
    "hatch.linewidth": 0.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.dpi": 100,
    "savefig.dpi": SAVED_DPI,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "megafold-bench",
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's defaults with ours over them, whatever the user's own configuration says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield
