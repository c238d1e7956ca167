"""The sections of a report: each turns one run into a piece of the page."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafold_bench.records import Record
from reports.accounting import accounts
from reports.accounting import verdict as account_verdict
from reports.boundary import boundaries
from reports.cells import FLAG_MEANING, Cell, by_series, outcome_of
from reports.figures.canvas import slug
from reports.figures.save import Drawing
from reports.frame import Run
from reports.holders import holders
from reports.html_parts import Markup, figure, join, table, tag
from reports.units import DASH, bytes_text, duration_text, seconds_text, significant

LOG_LINES = 30


@dataclass(frozen=True)
class Part:
    """One run with what was made of it."""

    run: Run
    cells: list[Cell]
    drawings: dict[str, Drawing]

    @property
    def anchor(self) -> str:
        """Prefix of ids inside its figures."""
        return slug(self.run.name)


def _outcome(cell: Cell) -> Markup:
    style = "good" if cell.outcome.value == "ok" else "warn" if cell.outcome.is_ok else "bad"
    return tag("span", cell.outcome.value, class_=style)


def each(parts: Sequence[Part], make: Callable[[Part], Markup]) -> Markup:
    """`make` for every run, under its name where there are several."""
    if len(parts) == 1:
        return make(parts[0])
    return join(join([tag("h3", part.run.name), make(part)]) for part in parts)


def _summary(part: Part) -> Markup:
    run, provenance = part.run, part.run.provenance
    counts = Counter(outcome_of(record).value for record in run.records)
    lengths = [cell.seq_len for cell in part.cells]
    facts: list[tuple[str, object]] = [
        ("device", provenance.device or DASH),
        ("variants", ", ".join(by_series(part.cells))),
        ("lengths", f"{min(lengths)} to {max(lengths)} tokens" if lengths else DASH),
        (
            "trials",
            f"{len(run.records)} (" + ", ".join(f"{n} {name}" for name, n in counts.most_common()) + ")",
        ),
        ("measuring took", duration_text(sum(record.get("wall_s") or 0 for record in run.records))),
        ("begun", run.manifest.get("created_at") or DASH),
        ("measured with", run.caption),
    ]
    sentences = [f"{boundary.series}: {boundary.text()}." for boundary in boundaries(part.cells)]
    return join(
        [table(("", ""), facts, words=2), tag("ul", *(tag("li", sentence) for sentence in sentences))]
    )


def _boundary(part: Part) -> Markup:
    rows = [
        (
            found.series, found.max_ok or DASH, found.min_fail or DASH, found.granularity or DASH,
            bytes_text(found.capacity_bytes), found.n_trials,
            "yes" if found.monotone else tag("span", "no", class_="bad"), found.other_end or DASH,
        )
        for found in boundaries(part.cells)
    ]  # fmt: skip
    return table(
        ("series", "longest that fits", "shortest that does not", "gap", "capacity", "trials", "monotone", "other ending"),
        rows,
    )  # fmt: skip


def _marks(cell: Cell) -> str:
    return ", ".join(flag.replace("_", " ") for flag in cell.flags)


def _time(part: Part) -> Markup:
    if not part.run.measures_time:
        return tag("p", "No trial of this run was to measure time.")
    groups = by_series(part.cells)
    reference = {cell.seq_len: cell for cell in next(iter(groups.values()), [])}
    rows = []
    for cell in sorted(part.cells, key=lambda cell: cell.seq_len):
        time, base = cell.time, reference.get(cell.seq_len)
        speed = base.time.median / time.median if time and base and base.time else None
        rows.append((
            cell.series, _outcome(cell), cell.seq_len, seconds_text(time.median if time else None),
            f"{seconds_text(time.interval.lo)} – {seconds_text(time.interval.hi)}" if time and time.n_steps > 1 else DASH,
            f"{len(time.processes)} × {time.n_steps // len(time.processes)}" if time else DASH,
            f"{speed:.2f}×" if speed else DASH, seconds_text(cell.gpu_time_s), seconds_text(cell.data_wait_s),
            significant(cell.tokens_per_s) if cell.tokens_per_s else DASH, _marks(cell),
        ))  # fmt: skip
    headings = ("series", "outcome", "tokens", "median step", "95 % interval", "samples", "speed-up",
                "GPU time", "data wait", "tokens/s", "flags")  # fmt: skip
    drawings = [figure(part.drawings[name], part.anchor) for name in ("time", "throughput", "distribution")]
    return join([tag("div", *drawings, class_="figures"), table(headings, rows, words=2)])


def _memory(part: Part) -> Markup:
    rows = []
    for cell in sorted(part.cells, key=lambda cell: cell.seq_len):
        fields = (
            "allocated_peak_bytes",
            "reserved_peak_bytes",
            "device_used_peak_bytes",
            "non_torch_bytes",
            "host_rss_peak_bytes",
        )
        rows.append((
            cell.series, _outcome(cell), cell.seq_len, *(bytes_text(cell.memory.get(field)) for field in fields),
            bytes_text(cell.memory_spread_bytes),
        ))  # fmt: skip
    headings = (
        "series",
        "outcome",
        "tokens",
        "allocated",
        "reserved",
        "device",
        "outside PyTorch",
        "host",
        "spread",
    )
    drawing = tag("div", figure(part.drawings["memory"], part.anchor), class_="figures")
    return join([drawing, table(headings, rows, words=2), _accounted(part)])


def _accounted(part: Part) -> Markup:
    """What the vendor's library saw in use, against what PyTorch accounts for."""
    found = accounts(part.run.records)
    title = tag("h3", "Device memory accounted for")
    if not found:
        return join([title, tag("p", "No trial has both the allocator's and the device library's reading.")])
    lead = (
        "In use: the peak that the device's library (NVML, AMD SMI) saw. Outside PyTorch: context and library "
        "workspaces, read as the trial ended. Refused: as much of the request that ended the trial as may have been mapped "
        "just then. The remainder is what none of these explains."
    )
    rows = [
        (
            account.series, account.outcome.value, account.seq_len, bytes_text(account.used_bytes),
            bytes_text(account.reserved_bytes), bytes_text(account.outside_bytes),
            bytes_text(account.refused_bytes) if account.refused_bytes else DASH,
            bytes_text(account.remainder_bytes), f"{100 * account.remainder:.2f} %",
        )
        for account in found
    ]  # fmt: skip
    headings = (
        "series",
        "outcome",
        "tokens",
        "in use",
        "reserved",
        "outside PyTorch",
        "refused",
        "remainder",
        "of use",
    )
    told = [tag("p", lead, class_="faint"), tag("p", account_verdict(found))]
    return join([title, *told, table(headings, rows, words=2)])


def _energy(part: Part) -> Markup:
    rows = [
        (cell.series, cell.energy_method, cell.seq_len, f"{significant(cell.energy_j)} J",
         f"{significant(cell.energy_j / cell.time.median)} W" if cell.time else DASH)
        for cell in sorted(part.cells, key=lambda cell: cell.seq_len)
        if cell.energy_j is not None
    ]  # fmt: skip
    if rows:
        return table(("series", "method", "tokens", "energy per step", "mean power"), rows, words=2)
    reasons = {
        reason
        for record in part.run.records
        for source in (
            record.get("unavailable") or {},
            (record.get("telemetry") or {}).get("unavailable") or {},
        )
        for name, reason in source.items()
        if "energy" in name or name == "telemetry"
    }
    energies = ((record.get("telemetry") or {}).get("energy") or {} for record in part.run.records)
    reasons |= {energy["reason"] for energy in energies if energy.get("reason")}
    return tag(
        "p", "No energy was measured: " + ("; ".join(sorted(reasons)) or "the records give no reason") + "."
    )


def _ending(record: Record) -> tuple[str, int, str]:
    factors = record["factors"]
    return factors["variant"], factors["seq_len_tokens"], record["outcome"]["status"]


def _quality(part: Part) -> Markup:
    flags = sorted({flag for cell in part.cells for flag in cell.flags})
    rows = [
        (flag, FLAG_MEANING.get(flag, "set by the measurement"),
         ", ".join(f"{cell.series} {cell.seq_len}" for cell in part.cells if flag in cell.flags))
        for flag in flags
    ]  # fmt: skip
    pieces = [
        table(("flag", "meaning", "points"), rows, words=3)
        if rows
        else tag("p", "No point carries a quality flag.")
    ]
    pieces += [tag("p", f"Warning while reading: {warning}", class_="warn") for warning in part.run.warnings]
    shown = set()
    for record in part.run.records:
        outcome, key = record["outcome"], _ending(record)
        # Of several that ended alike, the one that kept a snapshot says most.
        kept = any(key == _ending(other) and "snapshot" in other["outcome"] for other in part.run.records)
        if outcome_of(record).is_ok or key in shown or (kept and "snapshot" not in outcome):
            continue
        shown.add(key)
        tail = "\n".join((outcome.get("log_tail") or "no output was kept").splitlines()[-LOG_LINES:])
        title = f"{key[0]} at {key[1]}: {key[2]}. {outcome.get('status_detail') or ''}"
        held = holders(part.run.path, record)
        pieces.append(tag("details", tag("summary", title), held, tag("pre", tail)))
    return join(pieces)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list) and any(isinstance(part, Mapping) for part in item):
            rows += [row for i, part in enumerate(item) for row in _flat(part, f"{prefix}{key}.{i}.")]
        elif item not in (None, "", [], {}):
            rows.append((f"{prefix}{key}", " ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return rows


def _environment(part: Part) -> Markup:
    worker: Mapping[str, Any] = next(
        (r["provenance"] for r in reversed(part.run.records) if (r.get("provenance") or {}).get("python")), {}
    )
    pieces = []
    for title, facts in (
        ("the machine", part.run.manifest.get("environment") or {}),
        ("the measured process", worker),
    ):
        pieces.append(
            tag("details", tag("summary", f"Of {title}"), table(("fact", "value"), _flat(facts), words=2))
        )
    return join([tag("p", part.run.caption), *pieces])


def _reproduce(part: Part) -> Markup:
    provenance = part.run.provenance
    argv = [str(word) for word in part.run.manifest.get("argv") or []]
    command = shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else "no command recorded"
    lines = [f"git checkout {provenance.commit}"] if provenance.commit else []
    lines += ["python -m pip install .", command, f"megafold-bench plot {shlex.quote(str(part.run.path))}"]
    notes = [tag("pre", "\n".join(lines))]
    if provenance.short_commit.endswith("+"):
        notes.append(tag("p", "The tree differed from the commit when this was measured.", class_="warn"))
    notes.append(
        tag("p", f"torch {provenance.torch or DASH}, triton {provenance.triton or DASH}, Python {provenance.python or DASH}. "
            "Every figure and table here can be redrawn from the run folder alone.", class_="faint")
    )  # fmt: skip
    return join(notes)


SECTIONS: tuple[tuple[str, str, Callable[[Part], Markup]], ...] = (
    ("Summary", "", _summary),
    ("Boundary", "The longest sequence that trained and the shortest that did not, from all trials of the run.", _boundary),
    ("Time", "Medians over all steps of all processes, with 95 % hierarchical bootstrap intervals; samples are processes × steps. The speed-up is against the first series.", _time),
    ("Memory", "Peaks of processes that measured nothing else, the largest over repeats.", _memory),
    ("Energy", "Of one training step, over the steady steps.", _energy),
    ("Quality", "Nothing is dropped: what asks for care is marked, in figures by hollow markers.", _quality),
    ("Environment", "", _environment),
    ("How to reproduce", "", _reproduce),
)  # fmt: skip
