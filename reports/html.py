"""The report: one HTML file that holds everything, needs no script and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megafold_bench.errors import UserError
from reports.cells import cells
from reports.compare import Comparison, compare
from reports.compare_table import ratio_text, summary, verdict
from reports.figures.canvas import slug
from reports.figures.comparison import comparison_drawing
from reports.figures.run import draw_run
from reports.figures.save import save
from reports.figures.style import COLUMN_IN
from reports.files import make_folder, write_text
from reports.frame import load_run
from reports.html_parts import Markup, figure, join, page, table, tag
from reports.html_sections import SECTIONS, Part, each
from reports.units import DASH, seconds_text


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


def _compared(parts: Sequence[Part]) -> list[Comparison | UserError]:
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


def _parts(run_dirs: Sequence[Path], published: bool) -> list[Part]:
    if not run_dirs:
        raise UserError("no run named: give at least one run folder")
    parts = []
    for run_dir in run_dirs:
        run = load_run(run_dir)
        if not run.records:
            raise UserError(f"{run_dir} has no record yet: nothing to report")
        parts.append(Part(run, cells(run.records), {d.name: d for d in draw_run(run, published)}))
    return parts


def figures_folder(report: Path) -> Path:
    """Where the figures of a report are written when they are asked for as files."""
    return report.with_name(f"{report.stem}-figures")


def _write_figures(
    parts: Sequence[Part],
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
    for title, lead, make in SECTIONS:
        content = [tag("p", lead, class_="faint")] if lead else []
        sections.append((title, join([*content, each(parts, make)])))
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
