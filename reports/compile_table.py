"""What compilers made of the kernels: a table for each architecture and one of what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reports.files import make_folder, write_text

COLUMNS = [
    "arch", "case", "ok", "problem", "accepted", "registers", "shared_bytes", "spill_bytes", "scalar_spills",
    "matrix_instructions", "compile_s",
]  # fmt: skip
PIPE_COLUMNS = 140
CSV_NAME = "kernels_offline.csv"


def compile_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows as a frame, matrix instructions as `name ×count` text."""
    frame = pd.DataFrame([{**row, "matrix_instructions": _matrix(row)} for row in rows], columns=COLUMNS)
    return frame


def _matrix(row: Mapping[str, Any]) -> str:
    counts: Mapping[str, int] = row["matrix_instructions"]
    return " ".join(f"{name}×{count}" for name, count in counts.items())


def print_compile_table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Registers per thread, shared memory (LDS), spills and matrix instructions of every case."""
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    for arch in dict.fromkeys(row["arch"] for row in rows):
        table = Table(title=str(arch), title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("kernel and configuration", overflow="fold")
        for name in ("registers", "shared", "spilled"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("matrix instructions", overflow="fold")
        for row in (row for row in rows if row["arch"] == arch):
            bad = row["problem"] and not row["accepted"]
            shown = [
                str(row["registers"]),
                f"{row['shared_bytes'] / 1024:.0f} KiB",
                _spill(row),
                _matrix(row),
            ]
            cells = shown if row["ok"] else ["–", "–", "–", "does not compile"]
            table.add_row(escape(str(row["case"])), *cells, style="red" if bad else None)
        console.print(table, crop=False)
    _print_verdict(rows, console)


def _spill(row: Mapping[str, Any]) -> str:
    text = f"{row['spill_bytes']} B" if row["spill_bytes"] else ""
    return text + (f" {row['scalar_spills']} scalar" if row["scalar_spills"] else "")


def _print_verdict(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    for row in rows:
        if row["problem"]:
            kind = f"accepted ({row['accepted']})" if row["accepted"] else "FAILED"
            text = f"{kind}: {row['arch']} {row['case']}: {row['problem']}"
            console.print(
                escape(text), style="dim" if row["accepted"] else "red", soft_wrap=True, highlight=False
            )
    failed = sum(bool(row["problem"] and not row["accepted"]) for row in rows)
    seconds = sum(row["compile_s"] for row in rows)
    arches = len({row["arch"] for row in rows})
    console.print(
        f"{len(rows)} kernels and configurations for {arches} architectures, {failed} failed "
        f"({seconds:.0f} s of compilation)",
        highlight=False,
        soft_wrap=True,
    )


def save_compile_csv(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the rows as CSV into `folder`."""
    return write_text(make_folder(folder) / CSV_NAME, compile_frame(rows).to_csv(index=False))
