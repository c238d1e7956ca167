"""How many trials a boundary search will take, told before it runs: the search itself, played through.

Where earlier records predict the boundary, it is played once with the prediction as the truth; else with
boundaries all over the grid, once with memory growing as the square of the length and once without any
reading of memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megafold_bench.boundary import BoundarySpec, history_of, known_before
from megafold_bench.bracket import next_length
from megafold_bench.growth import NOTHING, Growth, Knowledge, Observation, predict_longest
from megafold_bench.outcomes import Outcome
from megafold_bench.records import Record

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
    """What would be tried, in order, if the prediction is right; else the first length only. Nothing if it is over."""
    trials: int
    at_most: int
    recorded: int = 0
    """Trials that the search has behind it."""

    def text(self) -> str:
        """One line for a person."""
        name = self.variant
        if self.capacity_emulated_bytes is not None:
            name += f" at {self.capacity_emulated_bytes / 2**30:g} GiB"
        if not self.lengths:
            return f"{name}: over, {self.recorded} trials recorded"
        more = f" more after the {self.recorded} recorded" if self.recorded else ""
        if self.predicted is None:
            return (
                f"{name}: nothing known beforehand, {'next' if more else 'first'} length {self.lengths[0]}, "
                f"about {self.trials} trials{more}, {self.at_most} at most"
            )
        return (
            f"{name}: boundary predicted near {self.predicted:.0f} from earlier records, about {self.trials} "
            f"trials{more}: {', '.join(map(str, self.lengths))}"
        )


def _play(
    spec: BoundarySpec,
    longest: float,
    growth: Growth | None,
    known: Knowledge,
    recorded: Sequence[Observation] = (),
) -> tuple[int, ...]:
    """The lengths that a search whose boundary is `longest` has yet to try after those `recorded`."""
    history = list(recorded)
    capacity = known.capacity_bytes
    if capacity is None and growth is not None:
        capacity = round(growth.at(longest))
    while True:
        length = next_length(history, spec.grid, spec.start, spec.confirm, known, spec.probes_above)
        if length is None:
            return tuple(o.length for o in history[len(recorded) :])
        fits = length <= longest
        peak = round(growth.at(length)) if growth is not None and fits else None
        outcome = Outcome.OK if fits else Outcome.OOM_DEVICE
        history.append(Observation(length, outcome, peak, capacity))


def forecast(
    spec: BoundarySpec, variant: str, capacity: int | None, records: Sequence[Record] = ()
) -> Forecast:
    """What the search of a variant at a capacity will take, or what is left of it after `records`. Runs nothing."""
    known = known_before(spec, variant, capacity, records)
    done = history_of(records, variant, capacity)
    first = next_length(done, spec.grid, spec.start, spec.confirm, known, spec.probes_above)
    if first is None:
        return Forecast(variant, capacity, None, (), 0, 0, len(done))
    needs = {hint.length: hint.needs_bytes for hint in known.hints if hint.needs_bytes is not None}
    growth = None if known.capacity_bytes is None else Growth.through(needs, known.capacity_bytes)
    growth = growth or known.like
    predicted = predict_longest((), known)
    fits = [o.length for o in done if o.outcome.is_ok]
    fails = [o.length for o in done if o.outcome.is_memory]
    least, most = max(fits, default=0), min(fails, default=spec.longest + 1) - 1
    if predicted is not None:
        # What was seen since corrects what was predicted.
        lengths = _play(spec, min(max(predicted, least), max(most, least)), growth, known, done)
        return Forecast(variant, capacity, predicted, lengths, len(lengths), len(lengths), len(done))
    grid = spec.grid
    stride = max(1, (grid.last - grid.first) // grid.granularity // CASES) * grid.granularity
    cases: Sequence[int] = range(grid.first, grid.last + 1, stride)
    cases = [case for case in cases if least <= case <= most] or [least]
    square = [len(_play(spec, case, SQUARE, NOTHING, done)) for case in cases]
    blind = [len(_play(spec, case, None, NOTHING, done)) for case in cases]
    about, at_most = round(statistics.median(square)), max(square + blind)
    return Forecast(variant, capacity, None, (first,), about, at_most, len(done))
