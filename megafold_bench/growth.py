"""How memory grows with the length, from what was measured: for choosing what to measure next, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megafold_bench.outcomes import Outcome


@dataclass(frozen=True)
class Observation:
    """One trial of a search: the length, how it ended, what it reserved, what it could have reserved."""

    length: int
    outcome: Outcome
    peak_bytes: int | None = None
    capacity_bytes: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class Hint:
    """What an earlier record says of a length: whether it should fit, and what it needs if that is known."""

    length: int
    fits: bool
    needs_bytes: int | None = None


@dataclass(frozen=True)
class Growth:
    """Memory by length: ``constant + linear n + quadratic n²`` bytes, with a quadratic term above zero."""

    constant: float
    linear: float
    quadratic: float

    @classmethod
    def through(cls, needs: Mapping[int, int], capacity: int) -> Growth | None:
        """Through the three lengths whose memory is nearest to `capacity`; through two, no linear term.

        None for fewer than two lengths or memory that does not grow.
        """
        if len(needs) < 2:
            return None
        near = sorted(needs, key=lambda n: (abs(needs[n] - capacity), n))[:3]
        points = [(n, needs[n]) for n in sorted(near)]
        linear, quadratic = 0.0, 0.0
        if len(points) == 3:
            (n1, m1), (n2, m2), (n3, m3) = points
            slope, next_slope = (m2 - m1) / (n2 - n1), (m3 - m2) / (n3 - n2)
            quadratic = (next_slope - slope) / (n3 - n1)
            linear = slope - quadratic * (n1 + n2)
        if quadratic <= 0:  # two points, or three that do not bend upwards: rounding, or another kernel
            (n1, m1), (n2, m2) = points[-2:]
            linear, quadratic = 0.0, (m2 - m1) / (n2 * n2 - n1 * n1)
        if quadratic <= 0:
            return None
        at, bytes_at = points[-1]
        return cls(bytes_at - linear * at - quadratic * at * at, linear, quadratic)

    def scaled_to(self, needs: Mapping[int, int]) -> Growth:
        """This growth times what makes it meet the longest of `needs`; itself where there is none."""
        if not needs or self.at(max(needs)) <= 0:
            return self
        factor = needs[max(needs)] / self.at(max(needs))
        return Growth(factor * self.constant, factor * self.linear, factor * self.quadratic)

    def at(self, length: float) -> float:
        """Bytes at a length."""
        return self.constant + self.linear * length + self.quadratic * length * length

    def length_at(self, capacity: int) -> float | None:
        """The length that needs `capacity` bytes; None where there is none."""
        discriminant = self.linear**2 - 4 * self.quadratic * (self.constant - capacity)
        if discriminant < 0:
            return None
        root = (-self.linear + math.sqrt(discriminant)) / (2 * self.quadratic)
        return root if root > 0 else None


@dataclass(frozen=True)
class Knowledge:
    """What is known before a search: hints, and the bytes its trials may reserve.

    `like` is the growth of another variant of the same workload, for one of which nothing is known.
    """

    hints: tuple[Hint, ...] = ()
    capacity_bytes: int | None = None
    like: Growth | None = None

    def longest_fit(self, below: int) -> int | None:
        """The longest hinted length under `below` that should fit."""
        return max((h.length for h in self.hints if h.fits and h.length < below), default=None)

    def shortest_failure(self, above: int) -> int | None:
        """The shortest hinted length over `above` that should not fit."""
        return min((h.length for h in self.hints if not h.fits and h.length > above), default=None)


NOTHING = Knowledge()


def needed_bytes(history: Sequence[Observation], known: Knowledge) -> dict[int, int]:
    """Peak bytes by length: of hints, and over them of this search's own successes.

    Under allocator pressure the peak is the capacity itself and says nothing of what is needed.
    """
    needs = {hint.length: hint.needs_bytes for hint in known.hints if hint.needs_bytes is not None}
    measured = [o for o in history if o.outcome is Outcome.OK and o.peak_bytes is not None]
    return needs | {o.length: o.peak_bytes for o in measured if o.peak_bytes is not None}


def _capacity(history: Sequence[Observation], known: Knowledge) -> int | None:
    return next((o.capacity_bytes for o in history if o.capacity_bytes is not None), known.capacity_bytes)


def predict_longest(history: Sequence[Observation], known: Knowledge = NOTHING) -> float | None:
    """The length at which the `Growth` of what was measured fills the device; None without one.

    With fewer than two lengths measured, another variant's growth stands in, scaled to the one there is.
    """
    capacity = _capacity(history, known)
    if capacity is None:
        return None
    needs = needed_bytes(history, known)
    growth = Growth.through(needs, capacity)
    if growth is None and known.like is not None:
        growth = known.like.scaled_to(needs)
    return None if growth is None else growth.length_at(capacity)
