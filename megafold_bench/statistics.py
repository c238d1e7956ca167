"""Summaries, intervals and comparisons of step times. numpy only.

Every function keeps all samples: outliers are counted and flagged, never dropped. Every bootstrap is
seeded, so the same samples give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
OUTLIER_LIMIT = 10.0
MAD_TO_SIGMA = 1.4826
DRIFT_LIMIT = 0.02
CHANGE_THRESHOLD = 0.03
MANN_WHITNEY_P = 0.002

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """One set of samples in the samples' own unit. `ci95_*` is the interval of the median."""

    n: int
    median: float
    q1: float
    q3: float
    min: float
    max: float
    mean: float
    std: float
    ci95_lo: float
    ci95_hi: float
    outliers_mad: int

    def as_dict(self) -> dict[str, float | int]:
        """For a record."""
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """A 95 % bootstrap percentile interval. `within_run` marks one process: no run-to-run variation in it."""

    estimate: float
    lo: float
    hi: float
    within_run: bool = False


def _as_array(samples: Sequence[float] | Floats) -> Floats:
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a non-empty list of samples, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("samples must be finite")
    return array


def outliers(samples: Sequence[float] | Floats, limit: float = OUTLIER_LIMIT) -> list[int]:
    """Positions of samples with |x − median| / (1.4826 · MAD) above `limit` (hyperfine's rule).

    With MAD 0 (more than half of the samples equal) every other value is one.
    """
    array = _as_array(samples)
    distance = np.abs(array - np.median(array))
    scale = MAD_TO_SIGMA * float(np.median(distance))
    return [int(i) for i in np.flatnonzero(distance > limit * scale)]


def _bootstrap_medians(array: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    # A block of resamples at a time: thousands of samples must not take gigabytes.
    block = max(1, 4_000_000 // array.size)
    parts = [
        np.median(array[rng.integers(0, array.size, size=(min(block, resamples - done), array.size))], axis=1)
        for done in range(0, resamples, block)
    ]
    return np.concatenate(parts)


def summarise(samples: Sequence[float] | Floats, seed: int = 0, resamples: int = RESAMPLES) -> Summary:
    """All of `Summary` over one series. `std` has n − 1 below the line (0 for one sample).

    Raises ValueError for no samples or samples that are not finite.
    """
    array = _as_array(samples)
    medians = _bootstrap_medians(array, resamples, np.random.default_rng(seed))
    lo, hi = np.percentile(medians, (2.5, 97.5))
    q1, median, q3 = np.percentile(array, (25, 50, 75))
    return Summary(
        n=int(array.size),
        median=float(median),
        q1=float(q1),
        q3=float(q3),
        min=float(array.min()),
        max=float(array.max()),
        mean=float(array.mean()),
        std=float(array.std(ddof=1)) if array.size > 1 else 0.0,
        ci95_lo=float(lo),
        ci95_hi=float(hi),
        outliers_mad=len(outliers(array)),
    )


def _hierarchical_medians(processes: Sequence[Floats], resamples: int, rng: np.random.Generator) -> Floats:
    """Medians of resamples of processes, then of steps within each chosen process, pooled.

    Processes may differ in length: shorter ones are filled up with infinity, which sorts behind every step.
    """
    count, longest = len(processes), max(process.size for process in processes)
    sizes = np.array([process.size for process in processes])
    table = np.full((count, longest), np.inf)
    for row, process in zip(table, processes, strict=True):
        row[: process.size] = process
    block = max(1, 4_000_000 // table.size)
    parts = []
    for done in range(0, resamples, block):
        rows = min(block, resamples - done)
        chosen = rng.integers(0, count, size=(rows, count, 1))
        drawn = (rng.random((rows, count, longest)) * sizes[chosen]).astype(np.intp)
        steps = np.where(np.arange(longest) < sizes[chosen], table[chosen, drawn], np.inf)
        pooled = np.sort(steps.reshape(rows, -1), axis=1)
        total = sizes[chosen].sum(axis=(1, 2))[:, None]
        middle = np.concatenate([(total - 1) // 2, total // 2], axis=1)
        parts.append(np.take_along_axis(pooled, middle, axis=1).mean(axis=1))
    return np.concatenate(parts)


def hierarchical_interval(
    processes: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Median over all steps with an interval that resamples processes first, then steps.

    `processes` holds the steps of each fresh process. With one process it is a within-run interval.
    """
    arrays = [_as_array(process) for process in processes]
    if not arrays:
        raise ValueError("no processes")
    rng = np.random.default_rng(seed)
    medians = (
        _bootstrap_medians(arrays[0], resamples, rng)
        if len(arrays) == 1
        else _hierarchical_medians(arrays, resamples, rng)
    )
    lo, hi = np.percentile(medians, (2.5, 97.5))
    return Interval(float(np.median(np.concatenate(arrays))), float(lo), float(hi), len(arrays) == 1)


def ratio_of_medians(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """median(b) / median(a) with its interval; below 1, `b` is faster. Each is a list of processes."""
    sides = [[_as_array(process) for process in side] for side in (a, b)]
    if not all(sides):
        raise ValueError("no processes on one side")
    rng = np.random.default_rng(seed)
    below, above = (_hierarchical_medians(side, resamples, rng) for side in sides)
    lo, hi = np.percentile(above / below, (2.5, 97.5))
    estimate = float(np.median(np.concatenate(sides[1])) / np.median(np.concatenate(sides[0])))
    return Interval(estimate, float(lo), float(hi), min(len(side) for side in sides) == 1)


def is_change(ratio: Interval, threshold: float = CHANGE_THRESHOLD) -> bool:
    """Whether a ratio is a change: its interval excludes 1 and it differs by at least `threshold`."""
    return (ratio.lo > 1.0 or ratio.hi < 1.0) and abs(ratio.estimate - 1.0) >= threshold


@dataclass(frozen=True)
class RankTest:
    """Mann–Whitney U, two-sided.

    `enough` is False where even perfect separation cannot reach p < 0.002: seven samples a side are
    needed (six would do for a one-sided test).
    """

    u: float
    p: float
    enough: bool


def _exact_u_counts(m: int, n: int) -> Floats:
    """How many of the C(m+n, m) orders give each U from 0 to m·n.

    An order of i + j elements ends either with one of the second group, which leaves U as it was, or
    with one of the first, which beats all j: count(i, j, u) = count(i, j−1, u) + count(i−1, j, u−j).
    """
    size = m * n + 1
    table = np.zeros((n + 1, size))
    table[:, 0] = 1.0
    for _ in range(m):
        row = np.zeros_like(table)
        row[0, 0] = 1.0
        for j in range(1, n + 1):
            row[j] = row[j - 1]
            row[j, j:] += table[j, : size - j]
        table = row
    return table[n]


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> RankTest:
    """Two-sided Mann–Whitney U: exact without ties up to 20 a side, else normal with tie correction."""
    first, second = _as_array(a), _as_array(b)
    m, n = first.size, second.size
    pooled = np.concatenate([first, second])
    _, inverse, counts = np.unique(pooled, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = ((ends - counts + 1 + ends) / 2)[inverse]
    u = float(ranks[:m].sum() - m * (m + 1) / 2)
    smaller = min(u, m * n - u)
    if counts.max() == 1 and max(m, n) <= 20:
        orders = _exact_u_counts(m, n)
        p = 2 * float(orders[: int(smaller) + 1].sum() / orders.sum())
    else:
        ties = float(((counts**3 - counts).sum()) / ((m + n) * (m + n - 1)))
        sigma = math.sqrt(m * n / 12 * max(m + n + 1 - ties, 0.0))
        z = (smaller - m * n / 2 + 0.5) / sigma if sigma > 0 else 0.0
        p = math.erfc(max(-z, 0.0) / math.sqrt(2))
    return RankTest(u, min(p, 1.0), 2 / math.comb(m + n, m) <= MANN_WHITNEY_P)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: valid whatever the dependence."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Steadiness:
    """Where a series settles. `drift` is the relative range of the rolling median from there to the end."""

    steady_from: int
    drift: float
    steady: bool


def steadiness(
    samples: Sequence[float], skip: int = 2, window: int = 5, limit: float = DRIFT_LIMIT
) -> Steadiness:
    """First step, at least `skip`, from which the rolling median moves by less than `limit`.

    At least half of what follows `skip` must remain. A series that never settles is not steady, and
    its drift is that from `skip` on; with fewer than `window` + 1 steps left nothing can be said: not steady.
    """
    array = _as_array(samples)
    if array.size - skip < window + 1:
        return Steadiness(min(skip, array.size - 1), math.nan, False)
    rolling = np.median(np.lib.stride_tricks.sliding_window_view(array, window), axis=1)

    def drift_from(start: int) -> float:
        tail = rolling[start:]
        return float((tail.max() - tail.min()) / np.median(tail))

    latest = min(skip + (array.size - skip) // 2, rolling.size - 2)
    for start in range(skip, latest + 1):
        drift = drift_from(start)
        if drift < limit:
            return Steadiness(start, drift, True)
    return Steadiness(skip, drift_from(skip), False)


def quality_flags(
    samples: Sequence[float],
    *,
    steady: bool | None = None,
    throttle_fraction: float | None = None,
    foreign_processes: int = 0,
    allocator_retries: int = 0,
) -> tuple[str, ...]:
    """Why a point should be read with care: any of ``throttled, foreign_process, allocator_retries, unsteady, outliers``.

    `steady` None leaves the question to `steadiness` of the samples. A throttle fraction above 5 % of
    the sampled time counts. Without samples (a trial that measured memory) only the other reasons are looked at.
    """
    settled = steadiness(samples, skip=0).steady if steady is None and len(samples) > 5 else steady
    flags = {
        "throttled": throttle_fraction is not None and throttle_fraction > 0.05,
        "foreign_process": foreign_processes > 0,
        "allocator_retries": allocator_retries > 0,
        "unsteady": settled is False,
        "outliers": bool(samples) and bool(outliers(samples)),
    }
    return tuple(name for name, on in flags.items() if on)
