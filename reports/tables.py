"""The table of a run, finished or still going, on a terminal or in a pipe."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megafold_bench.boundary import BoundarySpec, recorded_boundaries
from megafold_bench.bracket import describe
from megafold_bench.outcomes import Outcome
from reports.cells import FLAG_MEANING, Cell, cells
from reports.frame import Run, load_run
from reports.units import DASH, bytes_text, seconds_text, significant

NARROW_COLUMNS = 100
"""Below this many columns a terminal gets the short form: fewer columns, no device memory."""


def _spread(cell: Cell) -> str:
    if cell.time is None or cell.time.median == 0:
        return ""
    half = max(cell.time.interval.hi - cell.time.median, cell.time.median - cell.time.interval.lo)
    return f"{significant(100 * half / cell.time.median, 2)} %"


def _marks(cell: Cell, numbers: dict[str, int]) -> str:
    marks = sorted(numbers[flag] for flag in cell.flags)
    return " [" + ",".join(str(mark) for mark in marks) + "]" if marks else ""


def _speed_up(cell: Cell, reference: Cell | None) -> str:
    if reference is None or cell.time is None or reference.time is None:
        return DASH
    return f"{reference.time.median / cell.time.median:.2f}×"


def _ending(cell: Cell) -> Text:
    passed = sum(status in (Outcome.OK, Outcome.OK_PRESSURE) for status in cell.statuses)
    text = cell.outcome.value
    if 0 < passed < len(cell.statuses):
        text += f" ({passed}/{len(cell.statuses)} ok)"
    style = "green" if cell.outcome is Outcome.OK else "yellow" if cell.outcome.is_ok else "red"
    return Text(text, style=style)


def flag_numbers(found: list[Cell]) -> dict[str, int]:
    """Footnote numbers of the flags that occur."""
    flags = sorted({flag for cell in found for flag in cell.flags})
    return {flag: number for number, flag in enumerate(flags, start=1)}


def _table(found: list[Cell], numbers: dict[str, int], narrow: bool) -> Table:
    on_device = any(cell.on_device for cell in found)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1) if narrow else (0, 2))
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("variant", overflow="fold")
    table.add_column("step (median)" if not narrow else "step", justify="right", no_wrap=True)
    table.add_column("±", justify="right", no_wrap=True)
    memory_names = ["allocated", "reserved", "device"] if on_device else ["host peak"]
    for name in memory_names[1:2] if narrow and on_device else memory_names:
        table.add_column(name, justify="right", no_wrap=not narrow)
    table.add_column("speed-up" if not narrow else "×", justify="right", no_wrap=not narrow)
    table.add_column("outcome", overflow="fold")
    ordered = sorted(found, key=lambda cell: cell.seq_len)  # stable: series keep their order
    first_series = found[0].series
    references = {cell.seq_len: cell for cell in found if cell.series == first_series}
    previous = None
    for cell in ordered:
        length = str(cell.seq_len) if cell.seq_len != previous else ""
        fields = ["allocated_peak_bytes", "reserved_peak_bytes", "device_used_peak_bytes"]
        fields = fields[1:2] if narrow else fields
        shown = [bytes_text(cell.memory.get(field)) for field in fields if on_device]
        shown = shown or [bytes_text(cell.memory.get("host_rss_peak_bytes"))]
        time = seconds_text(cell.time.median) if cell.time else DASH
        table.add_row(
            length, escape(cell.series), time, _spread(cell), *shown, _speed_up(cell, references.get(cell.seq_len)),
            _ending(cell) + _marks(cell, numbers),
        )  # fmt: skip
        previous = cell.seq_len
    return table


def _progress(run: Run) -> str:
    """What is still to come, where the manifest says how many trials were planned."""
    spec = run.manifest.get("spec") or {}
    points = len(spec.get("variants") or ()) * len(spec.get("seq_lens") or ())
    planned = points * ((spec.get("repeats") or 0) + 1)  # each repeat times; memory is measured once
    done = len(run.records)
    if done >= planned:
        return f"{done} trials"
    return f"{done} of {planned} trials so far"


def _boundaries(run: Run) -> list[str]:
    """What a boundary search has found so far, a line for each variant and capacity; nothing for other runs."""
    if run.manifest.get("kind") != "boundary":
        return []
    spec = BoundarySpec.from_dict(run.manifest["spec"])
    return [describe(found) for found in recorded_boundaries(spec, run.records)]


def print_table(run_dir: Path, console: Console | None = None) -> None:
    """Print the table of `run_dir`: time, memory, speed-up against the first variant, outcome, footnotes.

    Raises `UserError` if `run_dir` is no run folder.
    """
    out = console or Console()
    run = load_run(run_dir)
    out.print(f"[bold]{escape(run.name)}[/] · {_progress(run)}", highlight=False)
    out.print(escape(run.caption), style="dim", highlight=False, soft_wrap=True)
    found = cells(run.records)
    if not found:
        out.print("No trial has ended yet.")
    else:
        numbers = flag_numbers(found)
        out.print(_table(found, numbers, out.width < NARROW_COLUMNS))
        for line in _boundaries(run):
            out.print(escape(line), highlight=False, soft_wrap=True)
        _footnotes(out, found, numbers)
    for warning in run.warnings:
        out.print(f"warning: {escape(warning)}", style="yellow", highlight=False, soft_wrap=True)


def _footnotes(out: Console, found: list[Cell], numbers: dict[str, int]) -> None:
    notes = []
    if any(cell.time for cell in found):
        notes.append(
            "± is the larger side of the 95 % bootstrap interval of the median over all steps of all processes."
        )
    if any(cell.time and cell.time.interval.within_run for cell in found):
        notes.append("Points with one process have a within-run interval: run-to-run variation is not in it.")
    notes += [
        f"[{number}] {flag}: {FLAG_MEANING.get(flag, 'set by the measurement')}"
        for flag, number in numbers.items()
    ]
    for cell in found:
        if not cell.outcome.is_ok and cell.detail:
            notes.append(f"{cell.series} at {cell.seq_len}: {cell.detail}")
    for note in notes:
        out.print(escape(note), style="dim", highlight=False, soft_wrap=not out.is_terminal)
