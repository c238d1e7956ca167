"""A comparison on a terminal or in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from reports.compare import Comparison, Pair
from reports.units import DASH, bytes_text, seconds_text

NARROW_COLUMNS = 110
_WORDS = {"more": "slower", "less": "faster", "same": "no change", "": DASH}
_STYLES = {"more": "red", "less": "green", "same": "", "": "dim"}


def ratio_text(ratio: float | None, lo: float | None = None, hi: float | None = None) -> str:
    """``"1.052 [1.048, 1.057]"``, or a dash."""
    if ratio is None:
        return DASH
    return f"{ratio:.3f}" + (f" [{lo:.3f}, {hi:.3f}]" if lo is not None and hi is not None else "")


def verdict(pair: Pair) -> str:
    """What to say of a point in a word or two."""
    if pair.newly_failing:
        return f"now {pair.b.outcome.value}"
    if pair.b.outcome.is_ok and not pair.a.outcome.is_ok:
        return f"now runs (was {pair.a.outcome.value})"
    if not pair.a.outcome.is_ok:
        same = pair.a.outcome is pair.b.outcome
        return f"both {pair.b.outcome.value}" if same else f"{pair.a.outcome.value}, {pair.b.outcome.value}"
    called = pair.time_change in ("more", "less")
    return _WORDS[pair.time_change] + (
        " (within-run)" if called and pair.time and pair.time.within_run else ""
    )


def _points(comparison: Comparison, narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1) if narrow else (0, 2))
    table.add_column("point", overflow="fold")
    if not narrow:
        table.add_column("time A", justify="right", no_wrap=True)
        table.add_column("time B", justify="right", no_wrap=True)
    table.add_column("time B/A" if narrow else "time B/A [95 %]", justify="right", no_wrap=True)
    if not narrow:
        table.add_column("memory A", justify="right", no_wrap=True)
        table.add_column("memory B", justify="right", no_wrap=True)
    table.add_column("memory B/A", justify="right", no_wrap=not narrow)
    if any(pair.energy is not None for pair in comparison.pairs):
        table.add_column("energy B/A", justify="right", no_wrap=not narrow)
    table.add_column("verdict", overflow="fold")
    for pair in comparison.pairs:
        table.add_row(*_cells(comparison, pair, narrow))
    return table


def _cells(comparison: Comparison, pair: Pair, narrow: bool) -> list[str | Text]:
    time = pair.time
    row: list[str | Text] = [escape(pair.name)]
    if not narrow:
        row += [seconds_text(side.time.median if side.time else None) for side in (pair.a, pair.b)]
    bounds = (None, None) if time is None or narrow else (time.lo, time.hi)
    row.append(ratio_text(time.estimate if time else None, *bounds))
    if not narrow:
        row += [bytes_text(pair.a.peak_bytes), bytes_text(pair.b.peak_bytes)]
    row.append(ratio_text(pair.memory))
    if any(other.energy is not None for other in comparison.pairs):
        row.append(ratio_text(pair.energy))
    style = "red" if pair.newly_failing else _STYLES[pair.time_change]
    row.append(Text(verdict(pair) + ("*" if pair.a.flags or pair.b.flags else ""), style=style))
    return row


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Differences first, then the points, each series over all lengths, boundaries, and the verdict."""
    out = console or Console()

    def say(text: str, style: str = "") -> None:
        out.print(escape(text), style=style, highlight=False, soft_wrap=not out.is_terminal)

    say(f"A = {comparison.name_a}, B = {comparison.name_b}, by {comparison.by}; ratios are B/A", "bold")
    if comparison.differences:
        say("What differs:")
        for what, in_a, in_b in comparison.differences:
            say(f"  {what}: {in_a or DASH} → {in_b or DASH}")
    out.print(_points(comparison, out.width < NARROW_COLUMNS))
    for overall in comparison.overall:
        ratio = overall.ratio
        say(
            f"{overall.name}, {overall.n_points} lengths: {ratio_text(ratio.estimate, ratio.lo, ratio.hi)}, {_WORDS[overall.change]}"
        )
    for boundary in comparison.boundaries:
        say(f"boundary of {boundary.name}: A {boundary.a.text()}; B {boundary.b.text()}")
    for sentence in comparison.unmatched:
        say(f"not compared: {sentence}", "yellow")
    say(summary(comparison))
    if any(pair.time and pair.time.within_run for pair in comparison.pairs):
        say("One process on a side: intervals are within-run and miss run-to-run variation.", "dim")
    if any(pair.a.flags or pair.b.flags for pair in comparison.pairs):
        say("* a side carries a quality flag: see show.", "dim")
    for reason in comparison.failures:
        say(f"above --fail-above: {reason}", "red")


def summary(comparison: Comparison) -> str:
    """The finding in one sentence."""
    changed = comparison.changes
    timed = sum(pair.time is not None for pair in comparison.pairs)
    rule = f"change: 95 % interval without 1, at least {100 * comparison.threshold:g} %, Holm-corrected"
    if not changed:
        return f"No change of step time at {timed} points ({rule})."
    slower = sum(pair.time_change == "more" for pair in changed)
    return f"{slower} of {timed} points slower, {len(changed) - slower} faster ({rule})."
