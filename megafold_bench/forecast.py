"""How many trials a boundary search will take, told before it runs: the search itself, played through.

Where earlier records predict the boundary, it is played once with the prediction as the truth; else with
boundaries all over the grid, once with memory growing as the square of the length and once without any
reading of memory.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from megafold_bench.boundary import BoundarySpec, known_before
from megafold_bench.bracket import next_length
from megafold_bench.growth import NOTHING, Growth, Knowledge, Observation, predict_longest
from megafold_bench.outcomes import Outcome

CASES = 48
"""Boundaries that are played through where none is predicted."""

SQUARE = Growth(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Forecast:
    """The search of one variant at one capacity. `predicted` is None where nothing is known beforehand."""

    variant: str
    capacity_emulated_bytes: int | None
    predicted: float | None
    lengths: tuple[int, ...]
    """What would be tried, in order, if the prediction is right; else the first length only."""
    trials: int
    at_most: int

    def text(self) -> str:
        """One line for a person."""
        name = self.variant
        if self.capacity_emulated_bytes is not None:
            name += f" at {self.capacity_emulated_bytes / 2**30:g} GiB"
        if self.predicted is None:
            return (
                f"{name}: nothing known beforehand, first length {self.lengths[0]}, "
                f"about {self.trials} trials, {self.at_most} at most"
            )
        return (
            f"{name}: boundary predicted near {self.predicted:.0f} from earlier records, about {self.trials} "
            f"trials: {', '.join(map(str, self.lengths))}"
        )


def _play(spec: BoundarySpec, longest: float, growth: Growth | None, known: Knowledge) -> tuple[int, ...]:
    """The lengths of a search whose boundary is `longest`."""
    history: list[Observation] = []
    capacity = known.capacity_bytes
    if capacity is None and growth is not None:
        capacity = round(growth.at(longest))
    while True:
        length = next_length(history, spec.grid, spec.start, spec.confirm, known, spec.probes_above)
        if length is None:
            return tuple(o.length for o in history)
        fits = length <= longest
        peak = round(growth.at(length)) if growth is not None and fits else None
        outcome = Outcome.OK if fits else Outcome.OOM_DEVICE
        history.append(Observation(length, outcome, peak, capacity))


def forecast(spec: BoundarySpec, variant: str, capacity: int | None) -> Forecast:
    """What the search of a variant at a capacity will take. Runs nothing."""
    known = known_before(spec, variant, capacity)
    needs = {hint.length: hint.needs_bytes for hint in known.hints if hint.needs_bytes is not None}
    growth = None if known.capacity_bytes is None else Growth.through(needs, known.capacity_bytes)
    growth = growth or known.like
    predicted = predict_longest((), known)
    if predicted is not None:
        lengths = _play(spec, predicted, growth, known)
        return Forecast(variant, capacity, predicted, lengths, len(lengths), len(lengths))
    grid = spec.grid
    stride = max(1, (grid.last - grid.first) // grid.granularity // CASES) * grid.granularity
    cases = range(grid.first, grid.last + 1, stride)
    square = [len(_play(spec, case, SQUARE, NOTHING)) for case in cases]
    blind = [len(_play(spec, case, None, NOTHING)) for case in cases]
    first = next_length([], grid, spec.start, spec.confirm, known, spec.probes_above)
    assert first is not None
    return Forecast(variant, capacity, None, (first,), round(statistics.median(square)), max(square + blind))
