from __future__ import annotations

import io

import pytest
from rich.console import Console

from megafold_bench.progress import (
    LiveListener,
    PlainListener,
    can_redraw,
    describe,
    estimate_s,
    format_duration,
)
from megafold_bench.sweep import plan


def record(trial, status="ok", wall_s=2.0, **changes):
    return {
        "factors": trial.point.factors,
        "outcome": {"status": status, "status_detail": "why"},
        "wall_s": wall_s,
        "time": None,
        "memory": None,
        **changes,
    }


@pytest.fixture
def trials(fakes, spec):
    return plan(spec(seq_lens=(32, 64), repeats=2))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_estimate_uses_the_nearest_length(trials):
    times = [t for t in trials if t.point.phase == "time"]
    short = next(t for t in times if t.point.seq_len == 32)
    long = next(t for t in times if t.point.seq_len == 64)
    assert estimate_s([short], []) is None
    assert estimate_s([short, long], [record(short)]) == pytest.approx(2.0 + 4 * 2.0)
    assert estimate_s([long], [record(short), record(long, wall_s=5.0)]) == pytest.approx(5.0)
    assert estimate_s([], [record(short)]) == 0


def test_lines(trials):
    assert describe(record(trials[0], "timeout")) == "timeout: why"
    timed = {"step_time_s": {"median": 0.0123}}
    assert describe(record(trials[0], time=timed)) == "ok, median step 12.3 ms"
    assert describe(record(trials[0], memory={"host_rss_peak_bytes": 1 << 30})) == "ok, peak 1 GiB"


def test_plain_lines_are_not_wrapped_nor_marked_up(trials):
    out = io.StringIO()
    listener = PlainListener(Console(file=out, width=40))
    listener.on_trial(trials[0], 1, 6)
    failed = record(trials[0], "error")
    failed["outcome"]["status_detail"] = "[bold]a message that is longer than the console is wide[/bold]"
    listener.on_record(failed)
    assert out.getvalue() == (
        "[1/6] fake N=32 time #1: error: "
        "[bold]a message that is longer than the console is wide[/bold] (2 s)\n"
    )


@pytest.mark.parametrize(("term", "redraws"), [("xterm", True), ("dumb", False)])
def test_a_display_is_drawn_where_it_can_be_drawn_over(monkeypatch, term, redraws):
    monkeypatch.setenv("TERM", term)
    assert can_redraw(Console(file=io.StringIO(), force_terminal=True)) is redraws
    assert not can_redraw(Console(file=io.StringIO(), force_terminal=False))


def test_live_display_shows_outcomes_steps_and_time_left(trials, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with LiveListener(console, trials, [record(trials[0])]) as listener:
        listener.on_trial(trials[1], 2, len(trials))
        listener._drawn = 0.0  # as if the last drawing were long ago
        listener.on_event({"event": "step", "index": 4, "of": 7})
        listener.on_record(record(trials[1], "oom_device"))
    shown = out.getvalue()
    for words in ("●", "✕", "step 5/7", "2/6", "left after this trial"):
        assert words in shown
