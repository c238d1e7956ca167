"""The sampler's effect on a step: known effects are found, none is invented."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megafold_bench import sampler_cost
from megafold_bench.errors import UserError
from megafold_bench.points import Phase
from megafold_bench.sampler_cost import SamplerEffect, measure
from megafold_bench.sweep import make_point


def effect(by, noise=0.003, pairs=10, seed=0, dose=1.0):
    rng = np.random.default_rng(seed)
    drift = np.linspace(1.0, 1.05, pairs)  # the machine gets slower: common to both of a pair
    plain = drift * rng.normal(1, noise, pairs)
    watched = (1 + by) * drift * rng.normal(1, noise, pairs)
    return SamplerEffect.of(watched.tolist(), plain.tolist(), 0.05, dose)


def test_no_effect_is_below_one_per_cent():
    found = effect(0.0)
    assert found.lo < 1 < found.hi < 1.01
    assert found.verdict == "below 1 %" and "10 pairs: below 1 %" in found.text()


def test_effect_is_found_through_a_drift():
    found = effect(0.03)
    assert found.ratio == pytest.approx(1.03, abs=0.005) and found.verdict == "1 % or more"


def test_too_much_noise_is_undecided_and_asks_for_more_pairs():
    found = effect(0.005, noise=0.05)
    assert found.verdict == "undecided" and found.text().endswith("take more --pairs")


def test_a_dose_divides_the_effect_and_the_noise():
    """Five times the samples cost five times as much, in noise that would leave a plain sampler undecided."""
    assert effect(0.004, noise=0.02).verdict == "undecided"
    found = effect(5 * 0.004, noise=0.02, dose=5.0)
    assert found.ratio == pytest.approx(1.004, abs=0.003) and found.verdict == "below 1 %"
    assert "sampled 5 times as often" in found.text()


def test_few_pairs_are_refused(fakes, spec, tmp_path):
    with pytest.raises(UserError, match="--pairs 3"):
        measure(make_point(spec(), "fake", 32, Phase.TIME), 3, tmp_path)


def test_steps_run_in_turns_with_real_samplers(fakes, spec, tmp_path, monkeypatch):
    """Each step's sampler is a process of its own; without one it has come and gone before the step."""
    running, seen = [], []

    class Watched(sampler_cost.Sampler):
        def __enter__(self):
            running.append(1)
            return super().__enter__()

        def __exit__(self, *error):
            running.pop()
            super().__exit__(*error)

    step = sampler_cost._step

    def counted(workload, timer):
        seen.append(bool(running))
        return step(workload, timer)

    monkeypatch.setattr(sampler_cost, "Sampler", Watched)
    monkeypatch.setattr(sampler_cost, "_step", counted)
    point = make_point(spec(options={"step_ms": 2.0}), "fake", 32, Phase.TIME)
    pairs = []
    found = measure(point, 6, tmp_path, interval_s=0.01, on_pair=lambda *pair: pairs.append(pair))
    assert seen == [False] * point.warmup + [True, False, False, True] * 3
    assert len(found.with_s) == len(found.without_s) == 6 and 1 <= found.dose <= sampler_cost.DOSE
    assert all(0.002 <= seconds < 1 for seconds in (*found.with_s, *found.without_s))
    assert [pair[0] for pair in pairs] == list(range(6))
    assert len(list(tmp_path.glob("*.jsonl"))) == 12
    assert json.loads(json.dumps(found.as_dict()))["verdict"] == found.verdict
