"""The table of `megafold-bench kernels`: implementations side by side, an operator and a length at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reports.files import write_text
from reports.kernel_rows import caption_of, kernel_frame, read_rows
from reports.units import DASH, bytes_text, seconds_text, significant

CSV_NAME = "kernels.csv"
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}
ALLOWED_RATIO = 1.1
PIPE_COLUMNS = 200


def print_kernels(folder: Path, console: Console) -> None:
    """Print every group of a folder, and what the columns mean."""
    rows = read_rows(folder)
    frame = kernel_frame(rows)
    console.print(escape(caption_of(rows)), style="dim", highlight=False, soft_wrap=True)
    if frame.empty:
        console.print("nothing was measured")
        return
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    for (op, dtype, tokens), group in frame.groupby(["op", "dtype", "tokens"], sort=False):
        console.print(_group_table(f"{op} · N = {tokens} · {dtype}", group), crop=False)
        _print_failures(group, console)
    notes = (
        "Medians of device-timed repeats with a cold L2 cache (wall time on a CPU), 20th to 80th percentile; "
        "kernels: the device's work alone with a warm cache, what a pass takes above it is the host's; "
        "× floor: multiple of the least time that the counted FLOPs, bytes and exponentials take at this device's "
        "measured ceilings; peak: rise of allocated memory; error: the worst of all outputs and gradients against "
        "fp64, as a multiple of the definition's in the same dtype; bitwise: repeats agree in every bit."
    )
    console.print(notes, style="dim", highlight=False, soft_wrap=not console.is_terminal)


def _group_table(title: str, group: pd.DataFrame) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("implementation", no_wrap=True, min_width=max(map(len, group["implementation"])))
    passes = list(dict.fromkeys(group["pass"]))
    apart = {name for name, part in group.groupby("pass") if part["kernels_s"].notna().any()}
    for name in passes:
        table.add_column(PASS_NAMES[name], justify="right", no_wrap=True)
        if name in apart:
            table.add_column("kernels", justify="right", no_wrap=True)
        table.add_column("× floor", justify="right", no_wrap=True)
    for name in ("peak", "error", "bitwise"):
        table.add_column(name, justify="right", no_wrap=True)
    done = group[group["outcome"] == "ok"]
    best = {name: done.loc[done["pass"] == name, "median_s"].min() for name in passes}
    for implementation, part in done.groupby("implementation", sort=False):
        by_pass = {record["pass"]: record for record in part.to_dict("records")}
        cells: list[str] = []
        for name in passes:
            cells += _time_cells(by_pass.get(name), best[name], name in apart)
        table.add_row(str(implementation), *cells, *_quality(part.to_dict("records")))
    return table


def _time_cells(record: dict[Any, Any] | None, best: float, apart: bool) -> list[str]:
    """Time, that of the kernels if it stands `apart`, and the multiple of the floor."""
    if record is None:
        return [DASH] * (3 if apart else 2)
    text = f"{seconds_text(record['median_s'])} ({significant(100 * _spread(record), 2)} %)"
    kernels = seconds_text(record["kernels_s"]) if pd.notna(record["kernels_s"]) else DASH
    floor = f"{record['times_floor']:.1f}" if pd.notna(record["times_floor"]) else DASH
    shown = f"[bold]{text}[/]" if record["median_s"] == best else text
    return [shown, kernels, floor] if apart else [shown, floor]


def _spread(record: dict[Any, Any]) -> float:
    return (record["p80_s"] - record["p20_s"]) / record["median_s"] if record["median_s"] else 0.0


def _quality(records: list[dict[Any, Any]]) -> list[str]:
    peaks = [record["peak_bytes"] for record in records if pd.notna(record["peak_bytes"])]
    first = records[0]
    error = f"{first['error_ratio']:.2f}× ({first['error_of']})"
    bitwise = "yes" if first["bitwise"] else f"no: {first['differing']}"
    wrong = first["error_ratio"] > ALLOWED_RATIO
    return [bytes_text(max(peaks) if peaks else None), f"[yellow]{error}[/]" if wrong else error, bitwise]


def _print_failures(group: pd.DataFrame, console: Console) -> None:
    failed = group[group["outcome"] != "ok"].drop_duplicates("implementation")
    for record in failed.to_dict("records"):
        text = f"{record['implementation']}: {record['outcome']}: {record['detail']}"
        console.print(escape(text), style="dim", highlight=False, soft_wrap=True)


def save_kernels_csv(folder: Path) -> Path:
    """Write `kernels.csv` beside the rows."""
    return write_text(folder / CSV_NAME, kernel_frame(read_rows(folder)).to_csv(index=False))
