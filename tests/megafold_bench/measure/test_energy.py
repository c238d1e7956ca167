"""Energy against curves whose integral is known."""

import math

import numpy as np
import pytest

from megafold_bench.devices.base import Unavailable
from megafold_bench.measure.energy import counter_energy, integrate_power, window_energy

SECOND = 1_000_000_000
START = 7 * SECOND


def _curve(seconds=10.0, rate=20, base=400.0, swing=150.0, seed=0):
    """Power 400 + 150·sin(t) at irregular times, and its exact integral as the counter."""
    jitter = np.random.default_rng(seed).uniform(-0.2, 0.2, int(seconds * rate) + 1) / rate
    t = np.arange(int(seconds * rate) + 1) / rate + jitter
    power = base + swing * np.sin(t)
    counter = 1000.0 + base * t - swing * np.cos(t)
    return [START + int(x * SECOND) for x in t], list(power), list(counter)


def _exact(lo, hi, base=400.0, swing=150.0):
    return base * (hi - lo) - swing * (math.cos(hi) - math.cos(lo))


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 10.0), (1.234, 8.765), (3.0, 3.3)])
def test_trapezoid_and_counter_match_the_analytic_integral(lo, hi):
    times, power, counter = _curve()
    window = START + int(lo * SECOND), START + int(hi * SECOND)
    assert integrate_power(times, power, *window) == pytest.approx(_exact(lo, hi), rel=1e-3)
    assert counter_energy(times, counter, *window) == pytest.approx(_exact(lo, hi), rel=5e-3)


def test_a_counter_that_moves_in_steps():
    times, power, counter = _curve()
    stepped = [counter[i - i % 4] for i in range(len(counter))]
    energy = window_energy(times, power, stepped, START + SECOND, START + 9 * SECOND)
    assert energy.counter_j == pytest.approx(_exact(1, 9), rel=5e-3)
    assert energy.valid


def test_agreement_makes_it_valid():
    times, power, counter = _curve()
    energy = window_energy(times, power, counter, START + SECOND, START + 9 * SECOND)
    assert (energy.method, energy.valid, energy.reason) == ("counter", True, "")
    assert energy.ratio == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize(("factor", "valid"), [(0.79, False), (0.81, True), (1.24, True), (1.26, False)])
def test_the_ratio_decides_which_is_believed(factor, valid):
    times, power, counter = _curve()
    scaled = [factor * value for value in counter]
    energy = window_energy(times, power, scaled, START + SECOND, START + 9 * SECOND)
    assert energy.valid is valid
    assert energy.method == ("counter" if valid else "integrated")
    assert energy.energy_j == pytest.approx(_exact(1, 9) * (factor if valid else 1.0), rel=5e-3)


def test_a_short_window_is_not_valid():
    times, power, counter = _curve()
    energy = window_energy(times, power, counter, START + SECOND, START + 2 * SECOND)
    assert not energy.valid
    assert "shorter than 2 s" in energy.reason


def test_a_dead_or_backward_counter_leaves_the_integral():
    times, power, counter = _curve()
    window = START + SECOND, START + 9 * SECOND
    dead = window_energy(times, power, [5.0] * len(times), *window)
    assert (dead.method, dead.valid) == ("integrated", False)
    assert "stands still" in dead.reason
    back = [*counter[:100], *(value - 500 for value in counter[100:])]
    assert "backwards" in window_energy(times, power, back, *window).reason


def test_missing_samples_are_left_out_and_none_is_unavailable():
    times, power, _ = _curve()
    gaps = [value if i % 3 else None for i, value in enumerate(power)]
    assert integrate_power(times, gaps, START + SECOND, START + 9 * SECOND) == pytest.approx(
        _exact(1, 9), rel=5e-3
    )
    nothing = [None] * len(times)
    energy = window_energy(times, nothing, nothing, START, START + 5 * SECOND)
    assert isinstance(energy.energy_j, Unavailable)
    assert energy.method == "none"


def test_a_window_beyond_the_samples_is_refused():
    times, power, counter = _curve()
    assert isinstance(integrate_power(times, power, START - SECOND, START + SECOND), Unavailable)
    assert isinstance(counter_energy(times, counter, START, START + 12 * SECOND), Unavailable)
    with pytest.raises(ValueError, match="before it starts"):
        window_energy(times, power, counter, START, START)
