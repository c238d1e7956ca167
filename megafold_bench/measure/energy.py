"""Energy of a window of time, from a cumulative counter and, beside it, from integrated power.

Pure arithmetic on samples (time in nanoseconds of ``time.monotonic_ns``, power in watts, counter in
joules). The counter is the better instrument: a power sensor is a moving average and on some GPUs
looks only a quarter of the time. Each checks the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megafold_bench.devices.base import Reading, Unavailable

VALID_RATIO = (0.8, 1.25)
SHORTEST_WINDOW_S = 2.0  # NVML's counter moves about every 100 ms: under 2 s that is over 5 %.
NS = 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Energy:
    """Energy of one window on one device.

    `ratio` is counter over integrated power, `valid` whether it lies in 0.8–1.25 and the window is
    long enough; `reason` says why not. `energy_j` is the counter's where it is valid, else the
    integral, and `method` says which (``"counter"``, ``"integrated"``).
    """

    energy_j: Reading[float]
    method: str
    counter_j: Reading[float]
    integrated_j: Reading[float]
    ratio: Reading[float]
    valid: bool
    reason: str = ""


def _series(times_ns: Sequence[int], values: Sequence[float | None]) -> tuple[Floats, Floats]:
    """Times in seconds after the first, and values, without the samples that have none."""
    origin = times_ns[0] if times_ns else 0
    pairs = [((t - origin) * NS, v) for t, v in zip(times_ns, values, strict=True) if v is not None]
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def integrate_power(
    times_ns: Sequence[int], power_w: Sequence[float | None], start_ns: int, end_ns: int
) -> Reading[float]:
    """Trapezoidal integral of power over [start, end], joules.

    The ends are interpolated; up to one median sampling interval beyond the samples the nearest
    value is taken to hold. Unavailable with fewer than two samples or a window further outside.
    """
    t, p = _series(times_ns, power_w)
    if t.size < 2:
        return Unavailable("integrated power: fewer than two power samples")
    lo, hi = ((moment - times_ns[0]) * NS for moment in (start_ns, end_ns))
    slack = float(np.median(np.diff(t)))
    if lo < t[0] - slack or hi > t[-1] + slack:
        return Unavailable("integrated power: the window reaches beyond the samples")
    inside = (t > lo) & (t < hi)
    grid = np.concatenate([[lo], t[inside], [hi]])
    return float(np.trapezoid(np.interp(grid, t, p), grid))


def counter_energy(
    times_ns: Sequence[int], counter_j: Sequence[float | None], start_ns: int, end_ns: int
) -> Reading[float]:
    """Rise of the cumulative counter over [start, end], interpolated at both ends, joules.

    Unavailable where the counter goes backwards (seen on AMD) or stands still (MI100).
    """
    t, e = _series(times_ns, counter_j)
    if t.size < 2:
        return Unavailable("energy counter: fewer than two samples")
    lo, hi = ((moment - times_ns[0]) * NS for moment in (start_ns, end_ns))
    slack = float(np.median(np.diff(t)))
    if lo < t[0] - slack or hi > t[-1] + slack:
        return Unavailable("energy counter: the window reaches beyond the samples")
    if (np.diff(e) < 0).any():
        return Unavailable("energy counter: went backwards")
    # A counter that moves in steps is read between its steps, not on them.
    moved = np.concatenate([[True], np.diff(e) > 0])
    rise = float(np.diff(np.interp([lo, hi], t[moved], e[moved]))[0]) if moved.sum() > 1 else 0.0
    if rise <= 0:
        return Unavailable("energy counter: stands still")
    return rise


def window_energy(
    times_ns: Sequence[int],
    power_w: Sequence[float | None],
    counter_j: Sequence[float | None],
    start_ns: int,
    end_ns: int,
) -> Energy:
    """Energy of [start, end] by counter and by integrated power, with their agreement.

    Raises ValueError for a window that does not last.
    """
    if end_ns <= start_ns:
        raise ValueError(f"the window ends ({end_ns}) before it starts ({start_ns})")
    counter = counter_energy(times_ns, counter_j, start_ns, end_ns)
    integrated = integrate_power(times_ns, power_w, start_ns, end_ns)
    seconds = (end_ns - start_ns) * NS
    if isinstance(counter, Unavailable):
        method = "none" if isinstance(integrated, Unavailable) else "integrated"
        return Energy(integrated, method, counter, integrated, counter, False, counter.reason)
    if isinstance(integrated, Unavailable):
        return Energy(counter, "counter", counter, integrated, integrated, False, integrated.reason)
    if integrated <= 0:
        missing = Unavailable("integrated power is zero")
        return Energy(counter, "counter", counter, integrated, missing, False, missing.reason)
    ratio = counter / integrated
    if not VALID_RATIO[0] <= ratio <= VALID_RATIO[1]:
        reason = f"counter is {ratio:.2f} of integrated power, outside {VALID_RATIO[0]}–{VALID_RATIO[1]}"
        return Energy(integrated, "integrated", counter, integrated, ratio, False, reason)
    short = f"window of {seconds:.2f} s is shorter than {SHORTEST_WINDOW_S:.0f} s"
    valid = seconds >= SHORTEST_WINDOW_S
    return Energy(counter, "counter", counter, integrated, ratio, valid, "" if valid else short)
