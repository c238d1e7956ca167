"""What the device sampler costs a training step: the same steps with and without it, in turns.

One process trains; between its steps the sampler is started, or started and stopped again, so that only
the step itself tells the two apart: model, allocator, clocks and caches are the same. Pairs turn round
(with, without; without, with), so that a drift of the machine favours neither. Two fresh processes differ
by more than the sampler costs.

A step that the host paces still varies by some per cent, more than the sampler costs. Therefore the sampler
takes a *dose*: every reading several times as often as in a sweep. What that costs is divided by the
dose that it achieved, since the cost of watching is that of its readings; so is the noise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megafold_bench.devices import Unavailable
from megafold_bench.errors import UserError
from megafold_bench.measure import steps
from megafold_bench.measure.sampler import Sampler
from megafold_bench.outcomes import NonFiniteLossError
from megafold_bench.points import Point
from megafold_bench.statistics import summarise
from megafold_bench.sweep import SAMPLE_INTERVAL_S
from megafold_bench.variants import Workload
from megafold_bench.worker import build

ACCEPTABLE = 0.01
"""The share of a step that watching may cost."""

FEWEST_PAIRS = 6
"""With fewer the interval of a median is the range of the pairs, and covers less than 95 %."""

DOSE = 5
"""How many times as often as in a sweep. A full reading takes NVML up to 6 ms, and is due every 20 ms with this."""


@dataclass(frozen=True)
class SamplerEffect:
    """Step times in seconds by pair, with and without the sampler, and what they say of one at `interval_s`.

    `dose` is how many times as often as that it sampled. `ratio` is the median over pairs of
    1 + (with / without - 1) / dose, `lo` and `hi` its 95 % bootstrap interval; 1 is no effect.
    """

    with_s: tuple[float, ...]
    without_s: tuple[float, ...]
    interval_s: float
    dose: float
    ratio: float
    lo: float
    hi: float

    @classmethod
    def of(
        cls, with_s: list[float], without_s: list[float], interval_s: float, dose: float = 1.0
    ) -> SamplerEffect:
        """The effect that these pairs show."""
        pairs = zip(with_s, without_s, strict=True)
        ratios = summarise([1 + (watched / alone - 1) / dose for watched, alone in pairs])
        return cls(
            tuple(with_s), tuple(without_s), interval_s, dose, ratios.median, ratios.ci95_lo, ratios.ci95_hi
        )

    @property
    def verdict(self) -> str:
        """``"below 1 %"``, ``"1 % or more"`` or ``"undecided"``."""
        if self.hi < 1 + ACCEPTABLE:
            return f"below {100 * ACCEPTABLE:g} %"
        return f"{100 * ACCEPTABLE:g} % or more" if self.lo >= 1 + ACCEPTABLE else "undecided"

    def text(self) -> str:
        """One line for a person."""
        line = (
            f"sampling every {1e3 * self.interval_s:g} ms changes a step by {100 * (self.ratio - 1):+.2f} % "
            f"[{100 * (self.lo - 1):+.2f}, {100 * (self.hi - 1):+.2f}], {len(self.with_s)} pairs"
        )
        line += f", sampled {self.dose:.2g} times as often" if self.dose > 1 else ""
        line += f": {self.verdict}"
        return line + ("; take more --pairs" if self.verdict == "undecided" else "")

    def as_dict(self) -> dict[str, Any]:
        """For a file: every raw value, and the finding."""
        return {
            "with_s": list(self.with_s),
            "without_s": list(self.without_s),
            "sample_interval_s": self.interval_s,
            "dose": self.dose,
            "ratio": self.ratio,
            "ci95_lo": self.lo,
            "ci95_hi": self.hi,
            "acceptable": ACCEPTABLE,
            "verdict": self.verdict,
        }


def _step(workload: Workload, timer: steps.Timer) -> float:
    times, loss = steps.timed_step(workload, timer)
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the loss is {loss}: these step times mean nothing")
    seconds = times["step_time_s"]
    assert seconds is not None
    return seconds


def _one(workload: Workload, timer: steps.Timer, watched: bool, sampler: Sampler) -> float:
    """One step with the sampler beside it, or just after it has come and gone."""
    with sampler:
        if watched:
            return _step(workload, timer)
    return _step(workload, timer)


def _dose(sampler: Sampler, interval_s: float) -> float:
    """How many times as often as every `interval_s` it really took a sample: a slow driver makes it miss some."""
    cost = sampler.result().cost
    if isinstance(cost, Unavailable):
        raise RuntimeError(f"the device sampler ended before the step did: {cost.reason}")
    return cost.samples * interval_s / cost.wall_s


def measure(
    point: Point,
    pairs: int,
    folder: Path,
    interval_s: float = SAMPLE_INTERVAL_S,
    dose: int = DOSE,
    on_pair: Callable[[int, float, float], None] = lambda index, with_s, without_s: None,
) -> SamplerEffect:
    """Train `point` in this process; the sampler's files go to `folder`. Raises `UserError` or what the step raises.

    `on_pair(index, with_s, without_s)` is called after each pair.
    """
    if pairs < FEWEST_PAIRS:
        raise UserError(f"--pairs {pairs}: an interval needs at least {FEWEST_PAIRS}")
    if dose < 1 or interval_s / dose < 0.001:
        raise UserError(
            f"--dose {dose}: must be from 1 to {int(interval_s * 1e3)}, a sample each millisecond"
        )
    if point.alloc_conf is not None:
        os.environ["PYTORCH_ALLOC_CONF"] = point.alloc_conf
    selector = point.device if point.device == "cpu" else f"{point.device}:0"
    workload, timer = build(point), steps.timer_for(point.device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    achieved: list[float] = []
    with steps.QuietCollector() as collector:
        for _ in range(point.warmup):
            _step(workload, timer)
        for index in range(pairs):
            for watched in (True, False) if index % 2 == 0 else (False, True):
                path = folder / f"{index}-{'with' if watched else 'without'}.jsonl"
                sampler = Sampler([selector], interval_s, path, dose)
                seconds[watched].append(_one(workload, timer, watched, sampler))
                if watched:
                    achieved.append(_dose(sampler, interval_s))
                collector.between_steps()
            on_pair(index, seconds[True][-1], seconds[False][-1])
    return SamplerEffect.of(seconds[True], seconds[False], interval_s, min(max(median(achieved), 1.0), dose))
