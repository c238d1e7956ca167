"""What a person sees while a sweep runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megafold_bench.launchers import Event
from megafold_bench.outcomes import Outcome
from megafold_bench.points import Trial
from megafold_bench.records import Record

MIN_REFRESH_S = 0.1
"""The display is drawn at most this often: the machine belongs to the measured process."""

_MARKS = {Outcome.OK: ("●", "green"), Outcome.OK_PRESSURE: ("◐", "yellow")}
_MARKS |= {Outcome.SKIPPED_DOMINATED: ("·", "dim"), Outcome.UNSUPPORTED: ("–", "dim")}
_FAILED = ("✕", "red")


def format_duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def estimate_s(trials: Iterable[Trial], records: Sequence[Record]) -> float | None:
    """Wall seconds that `trials` will take, from those recorded; None if nothing like them is known.

    A trial is taken to last as long as the same point did before, else as the nearest recorded length of
    the same phase, scaled with the square of the length, the growth of the pair representation.
    """
    run = [record for record in records if record["outcome"]["status"] != Outcome.SKIPPED_DOMINATED]
    total = 0.0
    for trial in trials:
        point = trial.point
        alike = [r for r in run if r["factors"]["phase"] == point.phase]
        same_variant = [r for r in alike if r["factors"]["variant"] == point.variant] or alike
        if not same_variant:
            return None
        nearest = min(same_variant, key=lambda r: abs(r["factors"]["seq_len_tokens"] - point.seq_len))
        growth = (point.seq_len / nearest["factors"]["seq_len_tokens"]) ** 2
        total += nearest["wall_s"] * (growth if nearest["outcome"]["status"].startswith("ok") else 1.0)
    return total


def describe(record: Record) -> str:
    """One line on a record: the outcome and its number."""
    outcome = Outcome(record["outcome"]["status"])
    if not outcome.is_ok:
        detail = record["outcome"]["status_detail"]
        return f"{outcome}: {detail}" if detail else str(outcome)
    times, memory = record["time"], record["memory"]
    if times is not None and times["step_time_s"] is not None:
        return f"{outcome}, median step {times['step_time_s']['median'] * 1e3:.4g} ms"
    if memory is not None:
        peak = memory.get("reserved_peak_bytes") or memory.get("host_rss_peak_bytes")
        return str(outcome) if peak is None else f"{outcome}, peak {peak / 2**30:.3g} GiB"
    return str(outcome)


class PlainListener:
    """One line when a trial ends. For logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._current = ""

    def on_trial(self, trial: Trial, number: int, of: int) -> None:
        """Keep its name for the line to come."""
        self._current = f"[{number}/{of}] {trial}"

    def on_event(self, event: Event) -> None:
        """Nothing: steps are not worth a line."""

    def on_tick(self) -> None:
        """Nothing."""

    def on_record(self, record: Record) -> None:
        """The line."""
        factors = record["factors"]
        name = self._current or f"{factors['variant']} N={factors['seq_len_tokens']} {factors['phase']}"
        self._current = ""
        self._console.print(
            f"{name}: {describe(record)} ({format_duration(record['wall_s'])})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def can_redraw(console: Console) -> bool:
    """Whether a display can be drawn over again: not in a pipe, nor on a terminal that cannot move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


class LiveListener:
    """The outcomes so far, the current trial and its steps, the time gone and the time left."""

    def __init__(self, console: Console, trials: Sequence[Trial], recorded: Sequence[Record]) -> None:
        self._trials = trials
        self._records = list(recorded)
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._began = time.monotonic()
        self._trial: Trial | None = None
        self._trial_began = 0.0
        self._number = 0
        self._step = ""
        self._drawn = 0.0

    def __enter__(self) -> LiveListener:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def on_trial(self, trial: Trial, number: int, of: int) -> None:
        """A trial begins."""
        self._trial, self._number, self._trial_began = trial, number, time.monotonic()
        self._step = "starting"
        self._draw(at_once=True)

    def on_event(self, event: Event) -> None:
        """It made progress."""
        if event["event"] == "step":
            self._step = f"step {event['index'] + 1}/{event['of']}"
        else:
            self._step = str(event["event"])
        self._draw()

    def on_tick(self) -> None:
        """A second has passed."""
        self._draw()

    def on_record(self, record: Record) -> None:
        """It ended."""
        self._records.append(record)
        self._draw(at_once=True)

    def _draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._drawn >= MIN_REFRESH_S:
            self._drawn = now
            self._live.update(Group(self._outcomes(), self._status(now)), refresh=True)

    def _outcomes(self) -> Table:
        variants = list(dict.fromkeys(trial.point.variant for trial in self._trials))
        lengths = sorted({trial.point.seq_len for trial in self._trials})
        marks: dict[tuple[str, int], Text] = {}
        for record in self._records:
            factors = record["factors"]
            mark, style = _MARKS.get(Outcome(record["outcome"]["status"]), _FAILED)
            marks.setdefault((factors["variant"], factors["seq_len_tokens"]), Text()).append(mark, style)
        table = Table("tokens", *(str(n) for n in lengths), box=None, pad_edge=False)
        for variant in variants:
            table.add_row(variant, *(marks.get((variant, n), Text("")) for n in lengths))
        return table

    def _status(self, now: float) -> Text:
        text = Text(f"\n{self._number}/{len(self._trials)}  ", style="bold")
        if self._trial is not None:
            text.append(f"{self._trial}  {self._step}  {format_duration(now - self._trial_began)}", "none")
        left = estimate_s(self._trials[self._number :], self._records)
        text.append(f"\n{format_duration(now - self._began)} elapsed", "dim")
        if left is not None:
            text.append(f", about {format_duration(left)} left after this trial", "dim")
        return text
