"""Intervals that cover, tests that agree with published tables, outliers that stay."""

import math
from itertools import combinations

import numpy as np
import pytest

from megafold_bench import statistics as st


def test_summary_of_a_known_series():
    summary = st.summarise([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (summary.n, summary.median, summary.q1, summary.q3) == (5, 3.0, 2.0, 4.0)
    assert (summary.min, summary.max, summary.mean) == (1.0, 5.0, 3.0)
    assert summary.std == pytest.approx(math.sqrt(2.5))
    assert 1.0 <= summary.ci95_lo <= 3.0 <= summary.ci95_hi <= 5.0


def test_same_samples_same_interval():
    samples = np.random.default_rng(1).normal(1, 0.1, 30)
    assert st.summarise(samples) == st.summarise(list(samples))


def test_one_sample():
    summary = st.summarise([2.0])
    assert (summary.median, summary.std, summary.ci95_lo, summary.ci95_hi) == (2.0, 0.0, 2.0, 2.0)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_bad_samples_are_refused(bad):
    with pytest.raises(ValueError, match="samples"):
        st.summarise(bad)


def test_outliers_are_counted_and_kept():
    samples = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99, 9.0]
    assert st.outliers(samples) == [8]
    summary = st.summarise(samples)
    assert (summary.n, summary.max, summary.outliers_mad) == (9, 9.0, 1)
    assert st.outliers([1.0, 1.0, 1.0]) == []


def test_the_outlier_rule_is_ten_scaled_deviations():
    base = [-1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0]  # with one large value: median 0.5, MAD 1
    assert st.outliers([*base, 0.5 + 14.826 * 0.99]) == []
    assert st.outliers([*base, 0.5 + 14.826 * 1.01]) == [7]


def test_the_medians_interval_covers_the_median():
    """Step times with 2 % noise and 3 % spikes, 20 steps: nominal 95 %; seeded, so the count is exact."""
    rng = np.random.default_rng(0)
    big = rng.normal(1, 0.02, 200_000) + 0.2 * (rng.random(200_000) < 0.03)
    truth = float(np.median(big))
    hits = 0
    for trial in range(200):
        samples = rng.normal(1, 0.02, 20) + 0.2 * (rng.random(20) < 0.03)
        summary = st.summarise(samples, seed=trial, resamples=400)
        hits += summary.ci95_lo <= truth <= summary.ci95_hi
    assert 0.90 <= hits / 200 <= 0.99


def test_processes_that_differ_widen_the_interval():
    rng = np.random.default_rng(3)
    offsets = [0.95, 1.0, 1.05]
    processes = [list(rng.normal(offset, 0.005, 20)) for offset in offsets]
    honest = st.hierarchical_interval(processes)
    pooled = st.summarise(np.concatenate(processes))
    assert honest.hi - honest.lo > 1.5 * (pooled.ci95_hi - pooled.ci95_lo)
    assert not honest.within_run
    assert st.hierarchical_interval(processes[:1]).within_run


def _loop_medians(processes, resamples, rng):
    """The definition, one resample at a time."""
    result = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(processes), size=len(processes))
        result.append(
            np.median(np.concatenate([rng.choice(processes[p], size=len(processes[p])) for p in chosen]))
        )
    return np.array(result)


@pytest.mark.parametrize("sizes", [(20, 20, 20), (5, 20, 11, 1), (1, 1), (7,)])
def test_hierarchical_medians_are_distributed_as_defined(sizes):
    rng = np.random.default_rng(11)
    processes = [rng.normal(1 + 0.01 * i, 0.01, size) for i, size in enumerate(sizes)]
    fast = st._hierarchical_medians(processes, 20_000, np.random.default_rng(1))
    slow = _loop_medians(processes, 4_000, np.random.default_rng(2))
    assert np.isfinite(fast).all()
    # The largest distance between the two cumulative distributions (Kolmogorov and Smirnov); last digits aside.
    fast_sorted, slow_sorted = np.sort(fast.round(12)), np.sort(slow.round(12))
    places = np.union1d(fast_sorted, slow_sorted)
    below = [
        np.searchsorted(values, places, side="right") / values.size for values in (fast_sorted, slow_sorted)
    ]
    assert np.abs(below[0] - below[1]).max() < 0.035
    again = st._hierarchical_medians(processes, 20_000, np.random.default_rng(1))
    assert (fast == again).all()


def test_blocks_of_resamples_are_independent_and_complete():
    """So many steps that a block holds few resamples."""
    processes = [np.random.default_rng(i).normal(1, 0.01, 100_000) for i in range(3)]
    medians = st._hierarchical_medians(processes, 30, np.random.default_rng(0))
    assert medians.shape == (30,) and len(set(medians)) == 30


def test_the_hierarchical_interval_covers_over_processes():
    """Ten processes that differ by 1 %, 20 steps of 2 % each: nominal 95 %; seeded, so the count is exact."""
    rng = np.random.default_rng(21)
    hits = 0
    for trial in range(200):
        runs = [list(rng.normal(rng.normal(1, 0.01), 0.02, 20)) for _ in range(10)]
        interval = st.hierarchical_interval(runs, seed=trial, resamples=400)
        hits += interval.lo <= 1.0 <= interval.hi
    assert 0.90 <= hits / 200 <= 0.99


def test_the_interval_of_a_ratio_covers_it():
    rng = np.random.default_rng(22)
    hits = 0
    for trial in range(150):
        sides = [
            [list(rng.normal(mean * rng.normal(1, 0.01), 0.01, 20)) for _ in range(8)] for mean in (1.0, 1.05)
        ]
        ratio = st.ratio_of_medians(*sides, seed=trial, resamples=400)
        hits += ratio.lo <= 1.05 <= ratio.hi
    assert 0.88 <= hits / 150 <= 0.99


def test_ratio_sees_five_per_cent_and_only_that():
    rng = np.random.default_rng(4)

    def run(mean):
        return [list(rng.normal(mean, 0.01, 20)) for _ in range(3)]

    a, same, slower = run(1.0), run(1.0), run(1.05)
    ratio = st.ratio_of_medians(a, slower)
    assert ratio.lo < 1.05 < ratio.hi
    assert st.is_change(ratio)
    assert not st.is_change(st.ratio_of_medians(a, same))
    back = st.ratio_of_medians(slower, a)
    assert back.estimate == pytest.approx(1 / ratio.estimate)


def test_a_certain_but_small_difference_is_no_change():
    assert not st.is_change(st.Interval(1.02, 1.015, 1.025))
    assert st.is_change(st.Interval(0.9, 0.88, 0.92))
    assert not st.is_change(st.Interval(1.1, 0.99, 1.2))


def _brute_force_p(a, b):
    """Two-sided Mann–Whitney by trying every split."""
    pooled = sorted([*a, *b])
    m, n = len(a), len(b)

    def u_of(group):
        others = [x for x in pooled if x not in group]
        return sum(x > y for x in group for y in others)

    observed = u_of(a)
    low = min(observed, m * n - observed)
    splits = [u_of(group) for group in combinations(pooled, m)]
    return min(1.0, 2 * sum(u <= low for u in splits) / len(splits))


@pytest.mark.parametrize("seed", range(4))
def test_mann_whitney_is_exact(seed):
    rng = np.random.default_rng(seed)
    a, b = list(rng.normal(0, 1, 4)), list(rng.normal(0.8, 1, 5))
    assert st.mann_whitney(a, b).p == pytest.approx(_brute_force_p(a, b))


def test_six_a_side_is_enough_and_five_is_not():
    five = st.mann_whitney(range(5), range(10, 15))
    six = st.mann_whitney(range(6), range(10, 16))
    assert five.p == pytest.approx(2 / math.comb(10, 5))
    assert six.p == pytest.approx(2 / math.comb(12, 6))
    assert (five.enough, six.enough) == (False, False)
    seven = st.mann_whitney(range(7), range(10, 17))
    assert seven.enough
    assert seven.p <= st.MANN_WHITNEY_P


def test_large_and_tied_samples_use_the_normal_limit():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 60), rng.normal(0, 1, 60)
    assert st.mann_whitney(a, b).p > 0.01
    assert st.mann_whitney(a, b + 2).p < 1e-6
    assert st.mann_whitney([1.0, 1.0, 2.0], [1.0, 2.0, 2.0]).p > 0.3
    assert st.mann_whitney([1.0] * 4, [1.0] * 4).p == 1.0


def test_holm():
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([0.5, 0.9]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_steadiness():
    rng = np.random.default_rng(6)
    flat = list(rng.normal(1, 0.003, 30))
    assert st.steadiness(flat).steady
    assert st.steadiness(flat).steady_from == 2
    warming = [1.5 - 0.05 * i if i < 10 else 1.0 for i in range(40)]
    settled = st.steadiness(warming)
    assert settled.steady
    assert 5 <= settled.steady_from <= 12
    climbing = [1 + 0.01 * i for i in range(30)]
    assert not st.steadiness(climbing).steady
    assert st.steadiness(climbing).drift > 0.1
    assert not st.steadiness([1.0, 1.0, 1.0]).steady


def test_a_single_spike_does_not_make_a_series_unsteady():
    samples = [1.0] * 30
    samples[15] = 3.0
    assert st.steadiness(samples).steady


def test_quality_flags():
    flat = [1.0 + 0.001 * (i % 5) for i in range(30)]
    assert st.quality_flags(flat) == ()
    assert st.quality_flags(flat, throttle_fraction=0.5, foreign_processes=1, allocator_retries=2) == (
        "throttled",
        "foreign_process",
        "allocator_retries",
    )
    assert st.quality_flags([*flat, 9.0]) == ("outliers",)
    assert "unsteady" in st.quality_flags([1 + 0.01 * i for i in range(30)])
    assert st.quality_flags(flat, steady=False) == ("unsteady",)
