"""Writing a figure as SVG, PDF and PNG with its CSV: the same bytes for the same records."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from reports.figures.style import styled
from reports.files import make_folder, write_bytes, write_text

_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": "megafold-bench"},
    "pdf": {"CreationDate": None, "Creator": "megafold-bench", "Producer": None},
    "png": {"Software": None},
}


FORMATS = ("svg", "pdf", "png")


@dataclass(frozen=True)
class Drawing:
    """A figure with a name, the words for those who cannot see it, and what it was drawn from."""

    name: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame


def render(drawing: Drawing, fmt: str) -> bytes:
    """The file's content in `fmt`: svg, pdf or png (300 dpi). No dates in it."""
    buffer = io.BytesIO()
    metadata = dict(_METADATA[fmt])
    if fmt == "svg":
        metadata |= {"Title": drawing.title, "Description": drawing.caption}
    with styled():
        drawing.figure.savefig(buffer, format=fmt, metadata=metadata)
    return buffer.getvalue()


def save(drawing: Drawing, folder: Path, formats: Sequence[str] = FORMATS, prefix: str = "") -> list[Path]:
    """Write `formats` and the CSV into `folder`, the CSV last. `prefix` comes before the drawing's name.

    PDF files carry their fonts whole (Type 42, so that text can be searched and edited); in SVG, text is paths.
    """
    make_folder(folder)
    stem = f"{prefix}{drawing.name}"
    paths = [write_bytes(folder / f"{stem}.{fmt}", render(drawing, fmt)) for fmt in formats]
    return [*paths, write_text(folder / f"{stem}.csv", drawing.data.to_csv(index=False))]
