"""The figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from megafold_bench.errors import UserError
from reports.cells import Cell, as_frame, cells
from reports.figures.distribution import distribution_figure
from reports.figures.lines import Estimate, Getter, Overlay, Quantity, line_figure
from reports.figures.save import FORMATS, Drawing, save
from reports.figures.style import COLUMN_IN, styled
from reports.frame import Run, load_run
from reports.provenance import Provenance
from reports.published import SOURCE, PublishedSeries, for_vendor
from reports.units import GIB, bytes_text, bytes_unit, time_unit

CAPACITY_SHOWN_FROM = 0.35
"""The capacity rule is drawn once a peak reaches this share of it (or something ran out); below, it
would flatten the curves, and the caption gives it instead."""

POINT_COLUMNS = ["series", "variant", "seq_len_tokens", "tier", "outcome"]
TIME_COLUMNS = [
    "step_time_median_s", "step_time_ci95_lo_s", "step_time_ci95_hi_s", "step_time_q1_s", "step_time_q3_s",
    "n_processes", "n_steps",
]  # fmt: skip
MEMORY_COLUMNS = [
    "reserved_peak_bytes", "allocated_peak_bytes", "device_used_peak_bytes", "host_rss_peak_bytes", "capacity_bytes",
]  # fmt: skip


def step_time(cell: Cell) -> Estimate | None:
    """Median step time with its interval, seconds."""
    if cell.time is None:
        return None
    return Estimate(cell.time.median, cell.time.interval.lo, cell.time.interval.hi)


def throughput(cell: Cell) -> Estimate | None:
    """Tokens per second; the interval is that of the step time, turned round."""
    if cell.tokens_per_s is None or cell.time is None:
        return None
    tokens = cell.tokens_per_s * cell.time.median
    return Estimate(cell.tokens_per_s, tokens / cell.time.interval.hi, tokens / cell.time.interval.lo)


def peak(cell: Cell) -> Estimate | None:
    """Peak reserved device memory, or resident host memory on a CPU, bytes."""
    return None if cell.peak_bytes is None else Estimate(float(cell.peak_bytes))


def allocated(cell: Cell) -> Estimate | None:
    """Peak allocated device memory, bytes."""
    value = cell.memory.get("allocated_peak_bytes") if cell.on_device else None
    return None if value is None else Estimate(float(value))


def _note_on_flags(found: Sequence[Cell], get: Getter) -> str:
    """What the hollow markers of a figure mean; flags of points that are not in it are left to the table."""
    flags = sorted({flag for cell in found if get(cell) is not None for flag in cell.flags})
    return f" Hollow: {', '.join(flags).replace('_', ' ')}." if flags else ""


def _note_on_statistics(found: Sequence[Cell]) -> str:
    timed = [cell.time for cell in found if cell.time]
    if not timed:
        return ""
    within = " within one run" if any(time.interval.within_run for time in timed) else ""
    return f" Median and 95 % bootstrap interval{within}."


def _note_on_published(chosen: Sequence[PublishedSeries]) -> str:
    if not chosen:
        return ""
    ends = ", ".join(f"{series.system} at {series.oom_at}" for series in chosen if series.oom_at)
    return f" Grey: published, {chosen[0].device}, {SOURCE}; out of memory there: {ends}."


def _published_rows(chosen: Sequence[PublishedSeries], field: str, column: str) -> pd.DataFrame:
    rows = [
        {
            "series": series.label, "variant": series.system, "seq_len_tokens": length, "tier": "published",
            "outcome": "ok", column: value, "source": series.source,
        }
        for series in chosen
        for length, value in getattr(series, field).items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _data(found: Sequence[Cell], columns: Sequence[str], extra: pd.DataFrame | None = None) -> pd.DataFrame:
    frame = as_frame(found)[[*POINT_COLUMNS, *columns, "flags"]]
    if extra is None or extra.empty:
        return frame
    # Through records: concatenating frames lets empty columns change the types of full ones.
    return pd.DataFrame([*frame.to_dict("records"), *extra.to_dict("records")])


def time_drawing(
    found: Sequence[Cell], caption: str, chosen: Sequence[PublishedSeries] = (), width_in: float = COLUMN_IN
) -> Drawing:
    """Step time against length."""
    overlays = [Overlay(series.label, series.step_time_s) for series in chosen]
    largest = [e.hi or e.value for e in map(step_time, found) if e]
    largest += [value for overlay in overlays for value in overlay.values.values()]
    unit, per_second = time_unit(max(largest, default=1.0))
    quantity = Quantity(
        "Time per training step", f"step time ({unit})", step_time, 1 / per_second, overlays=overlays
    )
    text = (
        caption
        + "."
        + _note_on_statistics(found)
        + _note_on_flags(found, step_time)
        + _note_on_published(chosen)
    )
    data = _data(found, TIME_COLUMNS, _published_rows(chosen, "step_time_s", "step_time_median_s"))
    return Drawing("time", quantity.title, text, line_figure(quantity, found, text, width_in), data)


def _kind_of_peak(on_device: bool, overlaid: bool) -> str:
    """What the axis measures: with published series beside ours, more than one kind."""
    return "memory" if overlaid else "reserved" if on_device else "resident"


def memory_drawing(
    found: Sequence[Cell], caption: str, chosen: Sequence[PublishedSeries] = (), width_in: float = COLUMN_IN
) -> Drawing:
    """Peak memory against length, with the capacity that ends it."""
    on_device = any(cell.on_device for cell in found)
    overlays = [Overlay(s.label, s.allocated_peak_bytes) for s in chosen if s.allocated_peak_bytes]
    highest = max(
        [e.value for e in map(peak, found) if e] + [v for o in overlays for v in o.values.values()],
        default=0.0,
    )
    capacities = sorted({cell.capacity_bytes for cell in found if cell.capacity_bytes}) if on_device else []
    oom = any(cell.outcome.is_memory for cell in found)
    shown = [c for c in capacities if oom or highest >= CAPACITY_SHOWN_FROM * c]
    unit, per_unit = bytes_unit(max([highest, *map(float, shown)]) or GIB)
    quantity = Quantity(
        "Peak memory" if on_device else "Peak host memory",
        f"peak {_kind_of_peak(on_device, bool(overlays))} ({unit})", peak, per_unit,
        light=allocated if on_device else None, overlays=overlays,
        rules=[(float(c), f"capacity {bytes_text(c)}") for c in shown],
    )  # fmt: skip
    text = caption + "."
    if on_device:
        text += " Line: reserved by the allocator; pale line: allocated by tensors; maximum over repeats."
        text += "".join(f" Capacity {bytes_text(c)}, off the scale." for c in capacities if c not in shown)
    else:
        text += " Resident memory of the process; maximum over repeats."
    published = [series for series in chosen if series.allocated_peak_bytes]
    text += _note_on_flags(found, peak) + _note_on_published(published)
    if published:
        text += (
            " What is published is peak allocated memory of another implementation: to be held against the pale "
            "lines, not against what is reserved."
        )
    data = _data(
        found, MEMORY_COLUMNS, _published_rows(chosen, "allocated_peak_bytes", "allocated_peak_bytes")
    )
    return Drawing("memory", quantity.title, text, line_figure(quantity, found, text, width_in), data)


def throughput_drawing(
    found: Sequence[Cell], caption: str, chosen: Sequence[PublishedSeries] = (), width_in: float = COLUMN_IN
) -> Drawing:
    """Tokens per second against length."""
    overlays = [Overlay(s.label, {n: n / t for n, t in s.step_time_s.items()}) for s in chosen]
    highest = max((e.value for e in map(throughput, found) if e), default=0.0)
    unit, per_unit = ("thousand tokens per second", 1e3) if highest >= 1e4 else ("tokens per second", 1.0)
    quantity = Quantity("Throughput", unit, throughput, per_unit, overlays=overlays)
    text = (
        caption
        + "."
        + _note_on_statistics(found)
        + _note_on_flags(found, throughput)
        + _note_on_published(chosen)
    )
    extra = pd.DataFrame(
        [
            {
                "series": o.label,
                "seq_len_tokens": n,
                "tier": "published",
                "throughput_tokens_per_s": v,
                "source": SOURCE,
            }
            for o in overlays
            for n, v in o.values.items()
        ]
    )
    data = _data(found, ["throughput_tokens_per_s", "n_processes", "n_steps"], extra)
    return Drawing("throughput", quantity.title, text, line_figure(quantity, found, text, width_in), data)


def distribution_drawing(found: Sequence[Cell], caption: str, width_in: float = COLUMN_IN) -> Drawing:
    """Every step of every point."""
    text = (
        caption
        + ". A dot for each step in the order run, process after process; bar: quartiles. Nothing is left out."
    )
    rows = [
        {"series": c.series, "seq_len_tokens": c.seq_len, "process": p, "step": s, "step_time_s": value}
        for c in found
        if c.time
        for p, process in enumerate(c.time.processes)
        for s, value in enumerate(process)
    ]
    data = pd.DataFrame(rows, columns=["series", "seq_len_tokens", "process", "step", "step_time_s"])
    return Drawing(
        "distribution", "Step-time distribution", text, distribution_figure(found, text, width_in), data
    )


def published_for(provenance: Provenance) -> tuple[PublishedSeries, ...]:
    """The paper's series for the GPU of a run."""
    return for_vendor(provenance.vendor, provenance.device)


def draw_run(run: Run, published: bool = False, width_in: float = COLUMN_IN) -> list[Drawing]:
    """The figures of a run that has at least one record, in the order of a report.

    Those of time only where a trial was to measure it: a boundary search has memory alone.
    """
    found = cells(run.records)
    caption = run.caption
    chosen = published_for(run.provenance) if published else ()
    with styled():
        memory = memory_drawing(found, caption, chosen, width_in)
        if not run.measures_time:
            return [memory]
        return [
            time_drawing(found, caption, chosen, width_in),
            memory,
            throughput_drawing(found, caption, chosen, width_in),
            distribution_drawing(found, caption, width_in),
        ]


def plot_run(
    run_dir: Path, published: bool = False, formats: Sequence[str] = FORMATS, width_in: float = COLUMN_IN
) -> list[Path]:
    """Draw a run's figures into its ``figures``, in each of `formats`, and the CSV of each; returns the paths.

    With `published` the paper's numbers lie behind, in grey. Raises `UserError` for a folder that is no
    run or has no record yet.
    """
    run = load_run(run_dir)
    if not run.records:
        raise UserError(f"{run_dir} has no record yet: nothing to draw")
    drawings = draw_run(run, published, width_in)
    return [path for drawing in drawings for path in save(drawing, run_dir / "figures", formats)]
