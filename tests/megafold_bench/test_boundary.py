from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megafold_bench.boundary import BoundarySpec, find_boundaries, parse_sizes, recorded_boundaries
from megafold_bench.bracket import Grid, conclude, describe, next_length
from megafold_bench.errors import UserError
from megafold_bench.forecast import forecast
from megafold_bench.growth import NOTHING, Growth, Hint, Knowledge, Observation, predict_longest
from megafold_bench.launchers import LocalLauncher
from megafold_bench.outcomes import Outcome
from megafold_bench.points import Phase
from megafold_bench.records import read_manifest, read_results
from megafold_bench.seeds import Seed, knowledge, seeds_from
from megafold_bench.sweep import Runner

OOM, OK = Outcome.OOM_DEVICE, Outcome.OK


def simulate(truth, grid, start=None, confirm=2, memory=None, limit=400, history=None, known=NOTHING):
    """Search against `truth(length, repeat)`; `memory(length)` gives the peak of a length that fits."""
    history = [] if history is None else history
    while True:
        length = next_length(history, grid, start, confirm, known)
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


def test_ends_that_were_not_repeated_are_called_so():
    history = [Observation(64, OK), Observation(96, Outcome.OOM_DEVICE)]
    grid = Grid(32, 4096)
    assert describe(conclude(history, grid, "v")).endswith("2 trials, not confirmed by repeats")
    assert describe(conclude(history * 2, grid, "v")).endswith("4 trials")


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
    with pytest.raises(UserError, match="--probe-steps 1: must be at least 2"):
        BoundarySpec(spec(), probe_steps=1)
    with pytest.raises(UserError, match="--probes-above -1"):
        BoundarySpec(spec(), probes_above=-1)
    seeds = (Seed("fake", 64, True, 5, 10, 12, 2), Seed("fake", 128, False, None, 10, 12, 2))
    asked = BoundarySpec(spec(device="cuda"), 64, (None, 1 << 30), 128, 2048, 3, 4, 1, seeds)
    assert BoundarySpec.from_dict(json.loads(json.dumps(asked.as_dict()))) == asked
    assert BoundarySpec.from_dict(asked.as_dict()) == asked


GIB = 1 << 30


def af3_bytes(length):
    """Reserved bytes of `pytorch` at preset af3 on an H200, a cubic through 256, 512, 768 and 1024 tokens."""
    x = (length - 256) / 256
    return round((10.0 + 7.5 * x + 6.4 * x * (x - 1) / 2 + 1.3 * x * (x - 1) * (x - 2) / 6) * GIB)


def probes(history, found):
    """Trials that are neither repeats nor the two checks above the boundary."""
    return len({o.length for o in history if found.min_fail is None or o.length <= found.min_fail})


@pytest.mark.parametrize("limit_gib", [20.0, 38.9, 62.0, 78.0, 138.9])
@pytest.mark.parametrize("granularity", [32, 128])
@pytest.mark.parametrize("slack", [1.0, 1.03, 1.08])
@pytest.mark.parametrize("seeded", [False, True])
def test_growth_as_measured_needs_few_probes(limit_gib, granularity, slack, seeded):
    """`slack` is how much of the reserved memory the allocator can give back: trials then pass under pressure."""
    limit = round(limit_gib * GIB)

    def run(length):
        if af3_bytes(length) / slack > limit:
            return Observation(length, OOM, None, limit)
        outcome = OK if af3_bytes(length) <= limit else Outcome.OK_PRESSURE
        return Observation(length, outcome, min(af3_bytes(length), limit), limit)

    hints = tuple(Hint(n, af3_bytes(n) <= limit, af3_bytes(n)) for n in (256, 512, 768, 1024))
    known = Knowledge((*hints, Hint(2048, False)), limit) if seeded else NOTHING
    grid, history = Grid(granularity, 8192), []
    while (length := next_length(history, grid, None, 2, known)) is not None:
        history.append(run(length))
        assert len(history) < 30
    found = conclude(history, grid, "v")
    assert af3_bytes(found.max_ok) / slack <= limit < af3_bytes(found.min_fail) / slack
    assert found.min_fail == found.max_ok + granularity and found.confirmed
    longest_way = 4 if seeded else 8
    assert probes(history, found) <= longest_way
    assert len(history) <= longest_way + 4


def test_hints_never_enter_the_answer():
    """Whatever hints say, right, wrong or contradictory, the answer is that of the search without them."""
    rng = random.Random(3)
    for _ in range(300):
        at = rng.randrange(32, 2048)
        hints = tuple(
            Hint(n, rng.random() < 0.5, rng.choice([None, rng.randrange(1, 100)]))
            for n in rng.sample(range(16, 4096, 8), rng.randrange(1, 6))
        )
        known = Knowledge(hints, 80)
        found, _ = simulate(threshold(at), Grid(32, 4096), known=known, memory=lambda n: n // 40)
        assert (found.max_ok, found.min_fail) == (at // 32 * 32, at // 32 * 32 + 32), (at, hints)
        assert found.confirmed and found.monotone


def test_hints_begin_the_search_beside_the_boundary():
    bounds = Knowledge((Hint(960, True), Hint(1088, False)))
    assert next_length([], Grid(32, 4096), known=bounds) == 960
    assert next_length([], Grid(32, 4096), start=64, known=bounds) == 64
    sized = Knowledge((Hint(100, True, 10), Hint(200, True, 25), Hint(320, False)), 100)
    assert next_length([], Grid(32, 4096), known=sized) == 288  # 435 by memory, but 320 failed before
    _, history = simulate(threshold(1000), Grid(32, 4096), known=bounds)
    assert [o.length for o in history] == [960, 1088, 1024, 992, 1056, 992, 1024]


def test_growth_goes_through_what_is_nearest_to_the_capacity():
    cubic = {n: af3_bytes(n) for n in (256, 512, 768, 1024)}
    growth = Growth.through(cubic, 40 * GIB)
    assert [round(growth.at(n) / GIB, 3) for n in (512, 768, 1024)] == [17.5, 31.4, 53.0]
    assert growth.at(growth.length_at(40 * GIB)) == pytest.approx(40 * GIB)
    assert Growth.through({256: 10, 512: 10, 768: 10}, 40) is None
    bent_down = Growth.through({1: 10, 2: 30, 3: 40}, 100)  # kernels changed: through the last two
    assert bent_down.linear == 0 and bent_down.at(3) == pytest.approx(40)


def seed_record(
    length, status="ok", reserved=None, emulated=None, variant="fake", workload=None, device="cuda"
):
    memory = None
    if reserved is not None:
        memory = {"reserved_peak_bytes": reserved, "non_torch_bytes": 1, "device_total_bytes": 101}
    return {
        "trial_id": f"{variant}-{length}-{status}-{emulated}", "attempt": 1,
        "factors": {"variant": variant, "seq_len_tokens": length, "device": device,
                    "capacity_emulated_bytes": emulated, "workload": workload or {"preset": "tiny"}},
        "outcome": {"status": status, "status_detail": ""},
        "memory": memory,
        "provenance": {"device_total_bytes": 101, "capacity_overhead_bytes": 2 if emulated else None},
    }  # fmt: skip


def test_records_become_seeds(fakes, spec):
    base = spec(device="cuda")
    ours = {"preset": "tiny", "ending": "ok", "step_ms": 1.0, "bad_step": 2, "touch": None}
    records = [
        seed_record(64, reserved=40, workload=ours),
        seed_record(96, "oom_device", workload=ours, emulated=50),
        seed_record(128, "ok_pressure", reserved=99, workload=ours),
        seed_record(160, "timeout", workload=ours),
        seed_record(192, reserved=90),  # another workload
        seed_record(224, reserved=90, workload=ours, device="cpu"),
        seed_record(256, reserved=90, workload=ours, variant="gone"),  # no longer registered
    ]
    seeds = seeds_from(records, base)
    assert seeds == (
        Seed("fake", 64, True, 40, 100, 101, 1),
        Seed("fake", 96, False, None, 48, 101, 2),
        Seed("fake", 128, True, None, 100, 101, 1),
    )
    whole = knowledge(seeds, "fake", None)
    # A failure with 48 bytes says nothing of 99, a success with 100 nothing certain of 99.
    assert whole == Knowledge((Hint(64, True, 40),), 99)
    smaller = knowledge(seeds, "fake", 32)
    assert smaller == Knowledge((Hint(64, False, 40), Hint(96, False)), 30)
    assert knowledge(seeds, "fake-slow", None) == Knowledge((), 99)  # one length tells no growth
    assert knowledge((), "fake", None) == NOTHING


def test_another_variants_growth_stands_in_until_two_lengths_are_measured():
    """`inductor` needs a twentieth less than `pytorch`, of which alone there are records."""
    seeds = [Seed("pytorch", n, True, af3_bytes(n), 139 * GIB, 140 * GIB, 0) for n in (512, 768, 1024)]
    known = knowledge(seeds, "inductor", 40 * GIB)
    assert known.hints == () and known.capacity_bytes == 40 * GIB
    limit, history, grid = 40 * GIB, [], Grid(32, 8192)
    while (length := next_length(history, grid, None, 2, known)) is not None:
        need = round(0.95 * af3_bytes(length))
        history.append(
            Observation(length, OK if need <= limit else OOM, need if need <= limit else None, limit)
        )
    assert [o.length for o in history] == [864, 896, 928, 960, 992, 896, 928]


def test_forecast_plays_the_search(fakes, spec):
    base = spec(device="cuda")
    blind = forecast(BoundarySpec(base, 32), "fake", None)
    assert blind.lengths == (256,) and blind.predicted is None
    assert 6 <= blind.trials <= 14 and blind.trials < blind.at_most <= 22
    seeds = tuple(
        Seed("fake", n, True, af3_bytes(n), 139 * GIB, 140 * GIB, GIB) for n in (256, 512, 768, 1024)
    )
    asked = BoundarySpec(base, 32, (40 * GIB, None), seeds=seeds)
    small, whole = (forecast(asked, "fake", capacity) for capacity in asked.capacities)
    assert small.lengths == (864, 896, 928, 960, 864, 896) and "864, 896" in small.text()
    assert 1600 < whole.predicted < 1700 and whole.trials <= 7


def test_forecast_of_what_is_left_of_a_real_search():
    """That of an H200, cut off after one trial of its second variant."""
    run = Path(__file__).resolve().parents[2] / "reports" / "reference" / "h200-boundary"
    asked = BoundarySpec.from_dict(read_manifest(run)["spec"])
    records = [r for r in read_results(run / "results.jsonl") if r["factors"]["variant"] == "pytorch"]
    begun = forecast(asked, "pytorch", None, records[:2])
    assert (begun.recorded, begun.lengths) == (2, (1792, 1536, 1664))
    assert forecast(asked, "pytorch", None, records).text() == "pytorch: over, 5 trials recorded"
    # A card that ran out of memory below the prediction: the search goes down from there.
    failed = [r for r in records if r["factors"]["seq_len_tokens"] == 1664]
    assert forecast(asked, "pytorch", None, failed[:1]).lengths[:2] == (1536, 1792)


def test_probes_take_the_fewest_steps_that_show_the_peak(open_run, listener, spec):
    asked = BoundarySpec(spec(options={"ending": "oom_device@100", "bad_step": 1}), 32, start=64, longest=256)
    folder = open_run(asked, kind="boundary")
    find_boundaries(asked, Runner(folder, LocalLauncher(), listener, 20.0))
    assert {r["factors"]["steps"] for r in folder.records} == {2}
    assert {r["factors"]["phase"] for r in folder.records} == {Phase.MEMORY}


def test_search_in_real_processes_and_its_resumption(open_run, listener, spec):
    """Half of the trials are recorded, the search begins again: it runs the other half only."""
    asked = BoundarySpec(
        spec(options={"ending": "oom_device@100", "bad_step": 1}), 32, start=64, longest=512, confirm=2
    )
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
