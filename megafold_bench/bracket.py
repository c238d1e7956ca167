"""The longest sequence that trains and the shortest that does not: which length to try next.

`next_length` looks at everything tried so far and names the next length, or says that the search is
over. It keeps no state of its own, so a search that was killed goes on from its records alone.

The search first brackets the boundary, then narrows the bracket on the grid, confirms both ends with
repeats and probes a little above: memory need not grow monotonically. Where memory was measured at two
lengths or more, its growth is extrapolated and the search aims at the length that should just fit; what
is aimed wrong is halved. Hints (what earlier records say of this boundary) serve the same purpose: a
prediction or a hint only ever chooses what to measure next, and is never part of the answer.

``max_ok`` is the longest length below every failure, ``min_fail`` the shortest above every success; with
a monotone boundary they are neighbours on the grid, otherwise the interval between them is what is
known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megafold_bench.errors import UserError
from megafold_bench.growth import NOTHING, Knowledge, Observation, needed_bytes, predict_longest
from megafold_bench.outcomes import Outcome

PROBES_ABOVE = 2
"""Grid points above the shortest failure that are tried as well."""

GROWTH = math.sqrt(2.0)
"""Memory grows with at least the square of the length: this doubles it."""

REACH = {1: 2.0, 2: 2.0}
FARTHEST = 4.0
"""How many times the longest success a fit through so many lengths, or more, may reach ahead."""

DEFAULT_START = 256


@dataclass(frozen=True)
class Grid:
    """The lengths a search may try: multiples of `granularity` up to `longest`."""

    granularity: int
    longest: int

    def __post_init__(self) -> None:
        """Raise `UserError` for a grid without points."""
        if self.granularity < 1:
            raise UserError(f"--granularity {self.granularity}: must be at least 1")
        if self.longest < self.granularity:
            raise UserError(f"--longest {self.longest}: must be at least the granularity, {self.granularity}")

    @property
    def first(self) -> int:
        """The shortest length."""
        return self.granularity

    @property
    def last(self) -> int:
        """The longest length."""
        return self.longest // self.granularity * self.granularity

    def snap(self, length: float) -> int:
        """The longest grid point not above `length`, within the grid."""
        snapped = int(min(length, self.longest) // self.granularity) * self.granularity
        return min(max(snapped, self.first), self.last)


@dataclass(frozen=True)
class Boundary:
    """What a search found. Lengths in tokens; None where there is no such length on the grid."""

    variant: str
    capacity_emulated_bytes: int | None
    granularity: int
    max_ok: int | None
    min_fail: int | None
    n_trials: int
    monotone: bool
    confirmed: bool
    """Both ends were repeated as often as asked, with the same outcome each time."""
    pressure_from: int | None
    """The shortest length that fitted only after allocator retries."""
    stopped: str | None
    """Why the search ended early or without a failure; None for a search that ran its course."""

    def as_dict(self) -> dict[str, Any]:
        """For an export."""
        return asdict(self)


class _Tried:
    """Observations grouped by length. A length passes if every trial at it did."""

    def __init__(self, history: Sequence[Observation]) -> None:
        self.by_length: dict[int, list[Observation]] = {}
        for observation in history:
            self.by_length.setdefault(observation.length, []).append(observation)
        self.passes = sorted(n for n, seen in self.by_length.items() if all(o.outcome.is_ok for o in seen))
        self.fails = sorted(n for n in self.by_length if n not in set(self.passes))
        self.max_ok = max((n for n in self.passes if not self.fails or n < self.fails[0]), default=None)
        self.min_fail = min((n for n in self.fails if not self.passes or n > self.passes[-1]), default=None)

    def count(self, length: int | None) -> int:
        """Trials at a length."""
        return len(self.by_length.get(length, ())) if length is not None else 0


def foreign_failure(history: Sequence[Observation]) -> Observation | None:
    """The first trial that ended for another cause than memory, which ends the search."""
    return next((o for o in history if not o.outcome.is_ok and not o.outcome.is_memory), None)


def _surprises(history: Sequence[Observation], known: Knowledge) -> int:
    """How many of the latest trials in a row passed although the prediction of the moment was shorter."""
    count = 0
    for index in range(len(history) - 1, 0, -1):
        predicted = predict_longest(history[:index], known)
        if predicted is None or not history[index].outcome.is_ok or history[index].length <= predicted:
            break
        count += 1
    return count


def next_length(
    history: Sequence[Observation],
    grid: Grid,
    start: int | None = None,
    confirm: int = 2,
    known: Knowledge = NOTHING,
    probes_above: int = PROBES_ABOVE,
) -> int | None:
    """The length to try next, or None when the search is over."""
    if foreign_failure(history) is not None:
        return None
    tried = _Tried(history)
    aim = predict_longest(history, known)
    if not tried.by_length:
        return _first(start, aim, grid, known)
    step = grid.granularity << min(_surprises(history, known), 10)
    reach = GROWTH if aim is None else REACH.get(len(needed_bytes(history, known)), FARTHEST)
    choices = (
        _bracket_below(tried, aim, grid, known),
        _bracket_above(tried, aim, grid, known, step, reach),
        _narrow(tried, aim, grid, step),
        _probe(tried, grid, probes_above),
        _confirm(tried, confirm),
    )
    return next((length for length in choices if length is not None), None)


def _first(start: int | None, aim: float | None, grid: Grid, known: Knowledge) -> int:
    """Where to begin: as asked, or at the length that should just fit, or at the longest that should fit."""
    if start is not None or (aim is None and not known.hints):
        return grid.snap(start or DEFAULT_START)
    ceiling = known.shortest_failure(0)
    if aim is None:
        fits = known.longest_fit(below=ceiling or grid.last + 1)
        return grid.snap(DEFAULT_START if fits is None else fits)
    return grid.snap(aim if ceiling is None else min(aim, ceiling - grid.granularity))


def _bracket_below(tried: _Tried, aim: float | None, grid: Grid, known: Knowledge) -> int | None:
    """A shorter length, while nothing below the shortest failure has passed."""
    if tried.max_ok is not None or not tried.fails or tried.fails[0] == grid.first:
        return None
    failure = tried.fails[0]
    if aim is not None and aim >= grid.first and grid.snap(aim) < failure:
        return grid.snap(aim)
    hinted = known.longest_fit(below=failure)
    if hinted is not None and hinted >= grid.first:
        low = grid.snap(hinted)
        return _middle(low, failure, grid) or low
    return min(grid.snap(failure / GROWTH), failure - grid.granularity)


def _bracket_above(
    tried: _Tried, aim: float | None, grid: Grid, known: Knowledge, step: int, reach: float
) -> int | None:
    """A longer length, while nothing above the longest success has failed."""
    if tried.min_fail is not None or not tried.passes or tried.passes[-1] == grid.last:
        return None
    longest = tried.passes[-1]
    wanted: float = longest * reach
    if aim is not None:
        # Where the longest success should be the last one, what comes next should fail: close the bracket.
        wanted = min(aim, wanted) if aim >= longest + grid.granularity else longest + step
    hinted = known.shortest_failure(above=longest)
    if hinted is not None:
        wanted = min(wanted, hinted)
    return max(grid.snap(wanted), longest + grid.granularity)


def _middle(low: int, high: int, grid: Grid) -> int | None:
    """The grid point half-way between two lengths; None if they are neighbours."""
    steps = (high - low) // grid.granularity
    return None if steps < 2 else low + steps // 2 * grid.granularity


def _narrow(tried: _Tried, aim: float | None, grid: Grid, step: int) -> int | None:
    """Between the last success below all failures and the first failure; and likewise at the top.

    Where the length that should just fit lies between them, it is tried; where it is the last success
    itself, the length after it, which should fail. A failure below the aim shows that the aim is too long
    and says no more: then the bracket is halved.
    """
    if tried.max_ok is not None and tried.fails:
        low, high = tried.max_ok, tried.fails[0]
        middle = _middle(low, high, grid)
        if middle is not None:
            wanted = (
                middle if aim is None else grid.snap(aim) if aim >= low + grid.granularity else low + step
            )
            return wanted if wanted < high else middle
    if tried.min_fail is not None and tried.passes:
        return _middle(tried.passes[-1], tried.min_fail, grid)
    return None


def _probe(tried: _Tried, grid: Grid, probes_above: int) -> int | None:
    """One or two lengths just above the boundary."""
    if tried.min_fail is None:
        return None
    for offset in range(1, probes_above + 1):
        length = tried.min_fail + offset * grid.granularity
        if length <= grid.last and not tried.count(length):
            return length
    return None


def _confirm(tried: _Tried, confirm: int) -> int | None:
    """The ends again, until each has been tried `confirm` times."""
    for length in (tried.max_ok, tried.min_fail):
        if length is not None and tried.count(length) < confirm:
            return length
    return None


def conclude(
    history: Sequence[Observation],
    grid: Grid,
    variant: str,
    capacity_bytes: int | None = None,
    confirm: int = 2,
) -> Boundary:
    """What a history says, finished or not."""
    tried = _Tried(history)
    ends = (tried.max_ok, tried.min_fail)
    stopped = None
    foreign = foreign_failure(history)
    memory_only = tried if foreign is None else _Tried([o for o in history if o is not foreign])
    if foreign is not None:
        detail = f" ({foreign.detail})" if foreign.detail else ""
        stopped = f"{foreign.outcome} at {foreign.length}, not for want of memory{detail}"
        ends = (memory_only.max_ok, memory_only.min_fail)
    elif tried.min_fail is None and tried.passes:
        stopped = f"{tried.passes[-1]} still fits and no longer length was tried"
    elif tried.max_ok is None and tried.fails:
        stopped = f"{tried.fails[0]}, the shortest length tried, does not fit"
    unanimous = all(
        len({o.outcome.is_ok for o in memory_only.by_length[n]}) == 1 and memory_only.count(n) >= confirm
        for n in ends
        if n is not None
    )
    pressure = [o.length for o in history if o.outcome is Outcome.OK_PRESSURE]
    return Boundary(
        variant=variant,
        capacity_emulated_bytes=capacity_bytes,
        granularity=grid.granularity,
        max_ok=ends[0],
        min_fail=ends[1],
        n_trials=len(history),
        monotone=not memory_only.passes
        or not memory_only.fails
        or memory_only.passes[-1] < memory_only.fails[0],
        confirmed=None not in ends and unanimous,
        pressure_from=min(pressure, default=None),
        stopped=stopped,
    )


def describe(found: Boundary) -> str:
    """One line for a person."""
    name = found.variant
    if found.capacity_emulated_bytes is not None:
        name += f" at {found.capacity_emulated_bytes / 2**30:g} GiB (capacity_emulated)"
    parts = [
        f"{name}: max_ok {found.max_ok if found.max_ok is not None else 'none'}",
        f"min_fail {found.min_fail if found.min_fail is not None else 'none'}",
        f"granularity {found.granularity}",
        f"{found.n_trials} trials",
    ]
    if not found.monotone:
        parts.append("not monotone: an interval, not a boundary")
    if None not in (found.max_ok, found.min_fail) and not found.confirmed:
        parts.append("not confirmed by repeats")
    if found.pressure_from is not None:
        parts.append(f"under allocator pressure from {found.pressure_from}")
    if found.stopped is not None:
        parts.append(f"stopped early: {found.stopped}")
    return ", ".join(parts)
