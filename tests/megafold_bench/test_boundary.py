from __future__ import annotations

import random

import pytest

from megafold_bench.boundary import (
    BoundarySpec,
    Grid,
    Observation,
    conclude,
    describe,
    find_boundaries,
    next_length,
    parse_sizes,
    predict_longest,
    recorded_boundaries,
)
from megafold_bench.errors import UserError
from megafold_bench.launchers import LocalLauncher
from megafold_bench.outcomes import Outcome
from megafold_bench.sweep import Runner

OOM, OK = Outcome.OOM_DEVICE, Outcome.OK


def simulate(truth, grid, start=None, confirm=2, memory=None, limit=400, history=None):
    """Search against `truth(length, repeat)`; `memory(length)` gives the peak of a length that fits."""
    history = [] if history is None else history
    while True:
        length = next_length(history, grid, start, confirm)
        if length is None:
            return conclude(history, grid, "v", None, confirm), history
        assert grid.first <= length <= grid.last and length % grid.granularity == 0
        outcome = truth(length, sum(o.length == length for o in history))
        fits = memory is not None and outcome.is_ok
        peak = memory(length) if fits else None
        history.append(Observation(length, outcome, peak, 100 if memory else None))
        assert len(history) < limit


def threshold(at):
    return lambda length, repeat: OK if length <= at else OOM


@pytest.mark.parametrize("granularity", [1, 32, 128])
@pytest.mark.parametrize("start", [None, 32, 2000, 100000])
def test_every_threshold_is_found(granularity, start):
    grid = Grid(granularity, 16 * granularity)
    for at in range(grid.first, grid.last, max(1, granularity // 3)):
        found, history = simulate(threshold(at), grid, start)
        expected = at // granularity * granularity
        assert (found.max_ok, found.min_fail) == (expected, expected + granularity)
        assert found.monotone and found.confirmed and found.stopped is None
        assert found.n_trials == len(history)
        for end in (found.max_ok, found.min_fail):
            assert sum(o.length == end for o in history) == 2


def test_probes_above_the_first_failure():
    _, history = simulate(threshold(500), Grid(32, 4096))
    assert {o.length for o in history} >= {480, 512, 544, 576}


def test_search_is_short():
    _, history = simulate(threshold(1500), Grid(32, 8192), start=256)
    assert len(history) <= 18


def test_prediction_shortens_the_search_and_does_not_change_its_result():
    def memory(length):
        return 20 + 80 * (length / 3000) ** 2

    truth = threshold(3000)
    blind, long_way = simulate(truth, Grid(32, 8192), start=256)
    seeded, short_way = simulate(truth, Grid(32, 8192), start=256, memory=memory)
    assert (seeded.max_ok, seeded.min_fail) == (blind.max_ok, blind.min_fail) == (2976, 3008)
    assert len(short_way) < len(long_way)


@pytest.mark.parametrize("error", [0.5, 0.8, 1.3, 3.0])
def test_wrong_prediction_still_ends_right(error):
    def memory(length):
        return 10 + 90 * (length / (3000 * error)) ** 2

    found, _ = simulate(threshold(3000), Grid(32, 8192), memory=memory)
    assert (found.max_ok, found.min_fail) == (2976, 3008)


def test_prediction_needs_growth_and_capacity():
    grown = [Observation(100, OK, 10, 100), Observation(200, OK, 25, 100)]
    assert predict_longest(grown) == pytest.approx(435.9, abs=0.1)  # 5 + 5·(n/100)² = 100
    assert predict_longest(grown[:1]) is None
    assert predict_longest([grown[0], Observation(200, OK, 10, 100)]) is None
    assert predict_longest([Observation(100, OK, 10), Observation(200, OK, 25)]) is None


def test_nothing_fits():
    found, _ = simulate(threshold(0), Grid(32, 4096))
    assert (found.max_ok, found.min_fail) == (None, 32)
    assert found.stopped is not None and "does not fit" in found.stopped
    assert not found.confirmed


def test_everything_fits():
    found, _ = simulate(threshold(10**6), Grid(32, 1000))
    assert (found.max_ok, found.min_fail) == (992, None)
    assert found.stopped is not None and "still fits" in found.stopped


def test_hole_in_the_middle_becomes_an_interval():
    """A slower kernel with less memory takes over above 700: 640–700 fail, 704–900 fit."""

    def truth(length, repeat):
        return OK if length < 640 or 700 < length <= 900 else OOM

    found, _ = simulate(truth, Grid(32, 4096), start=640)
    assert not found.monotone
    assert (found.max_ok, found.min_fail) == (608, 928)
    assert "interval" in describe(found)


def test_flaky_length_is_no_success():
    """512 fits once and not again: the boundary is below it, and both ends are still confirmed."""

    def truth(length, repeat):
        return OK if length < 512 or (length == 512 and repeat == 0) else OOM

    found, history = simulate(truth, Grid(32, 4096))
    assert (found.max_ok, found.min_fail) == (480, 512)
    assert sum(o.length == 480 for o in history) == 2
    assert not found.confirmed  # min_fail did not end the same way each time


def test_random_truths_end_with_a_consistent_answer():
    rng = random.Random(7)
    for _ in range(300):
        fits = {n: rng.random() < 0.5 for n in range(1, 41)}
        found, history = simulate(
            lambda n, repeat, fits=fits: OK if fits[n] else OOM, Grid(1, 40), start=rng.randint(1, 40)
        )
        passed = {o.length for o in history if o.outcome.is_ok}
        failed = {o.length for o in history} - passed
        assert found.max_ok is None or not failed or found.max_ok < min(failed)
        assert found.min_fail is None or not passed or found.min_fail > max(passed)
        assert found.monotone == (not passed or not failed or max(passed) < min(failed))


@pytest.mark.parametrize("at", [64, 256, 480])
def test_other_cause_stops_the_search_and_is_named(at):
    def truth(length, repeat):
        return Outcome.TIMEOUT if length >= at else OK

    found, history = simulate(truth, Grid(32, 4096), start=256)
    assert history[-1].outcome is Outcome.TIMEOUT
    assert sum(not o.outcome.is_ok for o in history) == 1
    assert found.stopped is not None
    assert found.stopped.startswith(f"timeout at {history[-1].length}, not for want of memory")
    assert found.min_fail is None and not found.confirmed


def test_pressure_fits_and_is_marked():
    def truth(length, repeat):
        return OK if length <= 400 else Outcome.OK_PRESSURE if length <= 500 else OOM

    found, _ = simulate(truth, Grid(32, 4096))
    assert found.max_ok == 480
    assert found.pressure_from is not None and 400 < found.pressure_from <= 480
    assert "pressure" in describe(found)


def test_killed_search_goes_on_where_it_was():
    """From every prefix of its own history the search takes the same course."""
    whole, history = simulate(threshold(700), Grid(32, 4096), start=128)
    for kept in range(len(history)):
        again, retaken = simulate(threshold(700), Grid(32, 4096), start=128, history=history[:kept])
        assert (again, retaken) == (whole, history)


def test_grid_and_sizes_refuse_nonsense():
    for bad in ((0, 100), (32, 31)):
        with pytest.raises(UserError):
            Grid(*bad)
    assert parse_sizes("40GiB, 80gb,512MiB") == (40 << 30, 80 * 10**9, 512 << 20)
    for text in ("", "40", "x", "0GiB", "40GiB,", "-1GiB"):
        with pytest.raises(UserError, match="--memory-limit"):
            parse_sizes(text)


def test_limits_are_checked(spec):
    with pytest.raises(UserError, match="needs a GPU"):
        BoundarySpec(spec(), capacities=(1 << 30,))
    with pytest.raises(UserError, match="--confirm 0"):
        BoundarySpec(spec(), confirm=0)
    with pytest.raises(UserError, match="--start"):
        BoundarySpec(spec(), start=0)
    asked = BoundarySpec(spec(device="cuda"), 64, (None, 1 << 30), 128, 2048, 3)
    assert BoundarySpec.from_dict(asked.as_dict()) == asked


def test_search_in_real_processes_and_its_resumption(open_run, listener, spec):
    """Half of the trials are recorded, the search begins again: it runs the other half only."""
    asked = BoundarySpec(spec(options={"ending": "oom_device@100"}), 32, start=64, longest=512, confirm=2)
    folder = open_run(asked, kind="boundary")
    runner = Runner(folder, LocalLauncher(), listener, 20.0)
    (found,) = find_boundaries(asked, runner)
    assert (found.max_ok, found.min_fail, found.confirmed) == (96, 128, True)
    ran = len(listener.trials)
    assert ran == found.n_trials == len(folder.records)
    assert recorded_boundaries(asked, folder.records) == [found]

    folder.close()
    lines = folder.results_path.read_bytes().splitlines(keepends=True)
    folder.results_path.write_bytes(b"".join(lines[: ran // 2]))
    listener.trials.clear()
    again = open_run(asked, kind="boundary", resume=True)
    assert find_boundaries(asked, Runner(again, LocalLauncher(), listener, 20.0)) == [found]
    assert len(listener.trials) == ran - ran // 2
