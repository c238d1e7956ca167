"""The report: one HTML file that holds everything, needs no script and asks the network for nothing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafold_bench.errors import UserError
from reports.accounting import accounts
from reports.accounting import verdict as account_verdict
from reports.boundary import boundaries
from reports.cells import FLAG_MEANING, Cell, by_series, cells, outcome_of
from reports.compare import Comparison, compare
from reports.compare_table import ratio_text, summary, verdict
from reports.figures.canvas import slug
from reports.figures.comparison import comparison_drawing
from reports.figures.run import draw_run
from reports.figures.save import Drawing, save
from reports.figures.style import COLUMN_IN
from reports.files import make_folder, write_text
from reports.frame import Run, load_run
from reports.html_parts import Markup, figure, join, page, table, tag
from reports.units import DASH, bytes_text, duration_text, seconds_text, significant

LOG_LINES = 30


@dataclass(frozen=True)
class _Part:
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


def _each(parts: Sequence[_Part], make: Callable[[_Part], Markup]) -> Markup:
    """`make` for every run, under its name where there are several."""
    if len(parts) == 1:
        return make(parts[0])
    return join(join([tag("h3", part.run.name), make(part)]) for part in parts)


def _summary(part: _Part) -> Markup:
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
        ("measured with", provenance.caption()),
    ]
    sentences = [f"{boundary.series}: {boundary.text()}." for boundary in boundaries(part.cells)]
    return join(
        [table(("", ""), facts, words=2), tag("ul", *(tag("li", sentence) for sentence in sentences))]
    )


def _boundary(part: _Part) -> Markup:
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


def _time(part: _Part) -> Markup:
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


def _memory(part: _Part) -> Markup:
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


def _accounted(part: _Part) -> Markup:
    """What the vendor's library saw in use, against what PyTorch accounts for."""
    found = accounts(part.run.records)
    title = tag("h3", "Device memory accounted for")
    if not found:
        return join([title, tag("p", "No trial has both the allocator's and the device library's reading.")])
    lead = (
        "In use: the peak that the device's library (NVML, AMD SMI) saw. Outside PyTorch: context and library "
        "workspaces, read as the trial ended. The remainder is what neither explains."
    )
    rows = [
        (
            account.series, account.outcome.value, account.seq_len, bytes_text(account.used_bytes),
            bytes_text(account.reserved_bytes), bytes_text(account.outside_bytes),
            bytes_text(account.remainder_bytes), f"{100 * account.remainder:.2f} %",
        )
        for account in found
    ]  # fmt: skip
    headings = ("series", "outcome", "tokens", "in use", "reserved", "outside PyTorch", "remainder", "of use")
    told = [tag("p", lead, class_="faint"), tag("p", account_verdict(found))]
    return join([title, *told, table(headings, rows, words=2)])


def _energy(part: _Part) -> Markup:
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


def _comparison(comparison: Comparison) -> Markup:
    rows = [
        (
            pair.name, verdict(pair), seconds_text(pair.a.time.median if pair.a.time else None),
            seconds_text(pair.b.time.median if pair.b.time else None),
            ratio_text(pair.time.estimate, pair.time.lo, pair.time.hi) if pair.time else DASH,
            ratio_text(pair.memory), ratio_text(pair.energy),
        )
        for pair in comparison.pairs
    ]  # fmt: skip
    prefix = slug(f"compare-{comparison.name_a}-{comparison.name_b}-{comparison.by}")
    pieces: list[Markup] = [
        tag("h3", f"{comparison.name_b} against {comparison.name_a}, by {comparison.by}"),
        tag("p", summary(comparison) + " Ratios are B over A: above 1, B is slower or larger."),
        tag("div", figure(comparison_drawing(comparison), prefix), class_="figures"),
        table(
            ("point", "verdict", "time A", "time B", "time B/A [95 %]", "memory B/A", "energy B/A"),
            rows,
            words=2,
        ),
    ]
    if comparison.differences:
        pieces.append(
            tag(
                "details",
                tag("summary", "What else differs"),
                table(("what", "A", "B"), comparison.differences, words=3),
            )
        )
    if comparison.unmatched:
        items = tag("ul", *(tag("li", sentence) for sentence in comparison.unmatched))
        pieces.append(tag("details", tag("summary", "Points not compared"), items))
    return join(pieces)


def _compared(parts: Sequence[_Part]) -> list[Comparison | UserError]:
    """The first run against each other one; with one run, its first variant against the others.

    Runs that have nothing in common give the error that says so.
    """
    first = parts[0].run
    wanted = [
        (part.run, "gpu" if part.run.provenance.device != first.provenance.device else "run")
        for part in parts[1:]
    ]
    if not wanted and len({cell.variant for cell in parts[0].cells}) > 1:
        wanted = [(first, "variant")]
    found: list[Comparison | UserError] = []
    for other, by in wanted:
        try:
            found.append(compare(first.path, other.path, by))
        except UserError as error:
            found.append(error)
    return found


def _comparisons(found: Sequence[Comparison | UserError]) -> Markup:
    if not found:
        return tag("p", "One run with one variant: nothing to compare.")
    return join(tag("p", str(c)) if isinstance(c, UserError) else _comparison(c) for c in found)


def _quality(part: _Part) -> Markup:
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
        outcome, factors = record["outcome"], record["factors"]
        key = (factors["variant"], factors["seq_len_tokens"], outcome["status"])
        if outcome_of(record).is_ok or key in shown:
            continue
        shown.add(key)
        tail = "\n".join((outcome.get("log_tail") or "no output was kept").splitlines()[-LOG_LINES:])
        title = f"{key[0]} at {key[1]}: {key[2]}. {outcome.get('status_detail') or ''}"
        pieces.append(tag("details", tag("summary", title), tag("pre", tail)))
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


def _environment(part: _Part) -> Markup:
    worker: Mapping[str, Any] = next(
        (r["provenance"] for r in reversed(part.run.records) if r.get("provenance")), {}
    )
    pieces = []
    for title, facts in (
        ("the machine", part.run.manifest.get("environment") or {}),
        ("the measured process", worker),
    ):
        pieces.append(
            tag("details", tag("summary", f"Of {title}"), table(("fact", "value"), _flat(facts), words=2))
        )
    return join([tag("p", part.run.provenance.caption()), *pieces])


def _reproduce(part: _Part) -> Markup:
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


_SECTIONS: tuple[tuple[str, str, Callable[[_Part], Markup]], ...] = (
    ("Summary", "", _summary),
    ("Boundary", "The longest sequence that trained and the shortest that did not, from all trials of the run.", _boundary),
    ("Time", "Medians over all steps of all processes, with 95 % hierarchical bootstrap intervals; samples are processes × steps. The speed-up is against the first series.", _time),
    ("Memory", "Peaks of processes that measured nothing else, the largest over repeats.", _memory),
    ("Energy", "Of one training step, over the steady steps.", _energy),
    ("Quality", "Nothing is dropped: what asks for care is marked, in figures by hollow markers.", _quality),
    ("Environment", "", _environment),
    ("How to reproduce", "", _reproduce),
)  # fmt: skip


def _parts(run_dirs: Sequence[Path], published: bool) -> list[_Part]:
    if not run_dirs:
        raise UserError("no run named: give at least one run folder")
    parts = []
    for run_dir in run_dirs:
        run = load_run(run_dir)
        if not run.records:
            raise UserError(f"{run_dir} has no record yet: nothing to report")
        parts.append(_Part(run, cells(run.records), {d.name: d for d in draw_run(run, published)}))
    return parts


def figures_folder(report: Path) -> Path:
    """Where the figures of a report are written when they are asked for as files."""
    return report.with_name(f"{report.stem}-figures")


def _write_figures(
    parts: Sequence[_Part],
    compared: Sequence[Comparison | UserError],
    folder: Path,
    formats: Sequence[str],
    published: bool,
    width_in: float,
) -> None:
    for number, part in enumerate(parts, start=1):
        # Two runs may have the same name in different folders.
        prefix = (
            f"{part.anchor}-" if len({p.anchor for p in parts}) == len(parts) else f"{number}-{part.anchor}-"
        )
        for drawing in draw_run(part.run, published, width_in):
            save(drawing, folder, formats, prefix)
    for comparison in compared:
        if isinstance(comparison, Comparison):
            name = slug(f"{comparison.name_a}-{comparison.name_b}-by-{comparison.by}")
            save(comparison_drawing(comparison, width_in), folder, formats, f"{name}-")


def write_report(
    run_dirs: Sequence[Path],
    path: Path,
    published: bool = False,
    formats: Sequence[str] = (),
    width_in: float = COLUMN_IN,
) -> Path:
    """Write the report of one or several runs to `path`; its figures also as `formats` (svg, pdf) beside it.

    With several runs each is compared with the first. Raises `UserError` for a folder that is no run, a
    run without records or a place that cannot be written.
    """
    parts = _parts(run_dirs, published)
    compared = _compared(parts)
    if formats:
        _write_figures(parts, compared, figures_folder(path), formats, published, width_in)
    sections = []
    for title, lead, make in _SECTIONS:
        content = [tag("p", lead, class_="faint")] if lead else []
        sections.append((title, join([*content, _each(parts, make)])))
    sections.insert(5, ("Comparison", _comparisons(compared)))
    names = ", ".join(part.run.name for part in parts)
    fixtures = [tag("div", f"{p.run.name}: FIXTURE, not measured. {p.run.provenance.fixture}", class_="banner")
                for p in parts if p.run.provenance.fixture]  # fmt: skip
    header = tag(
        "header", tag("h1", "AF3 training measured"), tag("p", f"Runs: {names}", class_="faint"), *fixtures
    )
    links = (tag("li", tag("a", title, href=f"#{slug(title.lower())}")) for title, _ in sections)
    bodies = (
        tag("section", tag("h2", title), content, id=slug(title.lower())) for title, content in sections
    )
    body = join([header, tag("nav", tag("ul", *links), aria_label="Contents"), tag("main", *bodies)])
    make_folder(path.parent)
    return write_text(path, page(f"AF3 training: {names}", body))
