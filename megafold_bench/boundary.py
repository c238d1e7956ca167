"""The longest sequence that trains and the shortest that does not.

`next_length` looks at everything tried so far and names the next length, or says that the search is
over. It keeps no state of its own, so a search that was killed goes on from its records alone.

The search first brackets the boundary, by growing or shrinking the length or by extrapolating the
memory measured so far (a prediction only ever chooses what to measure next), then halves the bracket on
the grid, confirms both ends with repeats and probes a little above: memory need not grow monotonically.
``max_ok`` is the longest length below every failure, ``min_fail`` the shortest above every success; with
a monotone boundary they are neighbours on the grid, otherwise the interval between them is what is
known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megafold_bench.errors import UserError
from megafold_bench.outcomes import Outcome
from megafold_bench.points import Phase, Trial
from megafold_bench.records import Record, latest
from megafold_bench.sweep import Runner, SweepSpec, make_point

PROBES_ABOVE = 2
"""Grid points above the shortest failure that are tried as well."""

GROWTH = math.sqrt(2.0)
"""Memory grows with at least the square of the length: this doubles it."""

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
        snapped = int(length // self.granularity) * self.granularity
        return min(max(snapped, self.first), self.last)


@dataclass(frozen=True)
class Observation:
    """One trial of a search: the length, how it ended, what it reserved."""

    length: int
    outcome: Outcome
    peak_bytes: int | None = None
    capacity_bytes: int | None = None
    detail: str = ""


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


def predict_longest(history: Sequence[Observation]) -> float | None:
    """The length at which ``a + b n + c n²``, put through what was measured, fills the device.

    Least squares through two lengths (without the linear term) or more. None without two lengths, a known
    capacity, or growth.
    """
    fits = {o.length: o.peak_bytes for o in history if o.outcome.is_ok and o.peak_bytes is not None}
    capacity = next((o.capacity_bytes for o in history if o.capacity_bytes is not None), None)
    if len(fits) < 2 or capacity is None:
        return None
    (n1, m1), (n2, m2) = sorted(fits.items())[-2:]
    quadratic = (m2 - m1) / (n2 * n2 - n1 * n1)
    constant = m1 - quadratic * n1 * n1
    if quadratic <= 0 or capacity <= constant:
        return None
    return math.sqrt((capacity - constant) / quadratic)


def next_length(
    history: Sequence[Observation], grid: Grid, start: int | None = None, confirm: int = 2
) -> int | None:
    """The length to try next, or None when the search is over."""
    if foreign_failure(history) is not None:
        return None
    tried = _Tried(history)
    if not tried.by_length:
        return grid.snap(start or DEFAULT_START)
    choices = (
        _bracket_below(tried, grid),
        _bracket_above(tried, predict_longest(history), grid),
        _halve(tried, grid),
        _probe(tried, grid),
        _confirm(tried, confirm),
    )
    return next((length for length in choices if length is not None), None)


def _bracket_below(tried: _Tried, grid: Grid) -> int | None:
    """A shorter length, while nothing below the shortest failure has passed."""
    if tried.max_ok is not None or not tried.fails or tried.fails[0] == grid.first:
        return None
    return min(grid.snap(tried.fails[0] / GROWTH), tried.fails[0] - grid.granularity)


def _bracket_above(tried: _Tried, predicted: float | None, grid: Grid) -> int | None:
    """A longer length, while nothing above the longest success has failed."""
    if tried.min_fail is not None or not tried.passes or tried.passes[-1] == grid.last:
        return None
    longest = tried.passes[-1]
    step = grid.granularity
    if predicted is None:
        wanted: float = longest * GROWTH
    elif predicted >= longest + step:
        wanted = min(predicted, 4.0 * longest)
    else:
        wanted = longest * 1.1  # past what was predicted: the prediction was too low
    return max(grid.snap(wanted), longest + step)


def _middle(low: int, high: int, grid: Grid) -> int | None:
    """The grid point half-way between two lengths; None if they are neighbours."""
    steps = (high - low) // grid.granularity
    return None if steps < 2 else low + steps // 2 * grid.granularity


def _halve(tried: _Tried, grid: Grid) -> int | None:
    """Between the last success below all failures and the first failure; and likewise at the top."""
    if tried.max_ok is not None and tried.fails:
        middle = _middle(tried.max_ok, tried.fails[0], grid)
        if middle is not None:
            return middle
    if tried.min_fail is not None and tried.passes:
        return _middle(tried.passes[-1], tried.min_fail, grid)
    return None


def _probe(tried: _Tried, grid: Grid) -> int | None:
    """One or two lengths just above the boundary."""
    if tried.min_fail is None:
        return None
    for offset in range(1, PROBES_ABOVE + 1):
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
    if found.pressure_from is not None:
        parts.append(f"under allocator pressure from {found.pressure_from}")
    if found.stopped is not None:
        parts.append(f"stopped early: {found.stopped}")
    return ", ".join(parts)


@dataclass(frozen=True)
class BoundarySpec:
    """What a boundary search was asked for. `base` gives variants, options, device and limits."""

    base: SweepSpec
    granularity: int = 32
    capacities: tuple[int | None, ...] = (None,)
    start: int | None = None
    longest: int = 8192
    confirm: int = 2

    def __post_init__(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        _ = self.grid
        if self.confirm < 1:
            raise UserError(f"--confirm {self.confirm}: must be at least 1")
        if self.start is not None and self.start < 1:
            raise UserError(f"--start {self.start}: must be at least 1")
        if self.base.device == "cpu" and any(capacity is not None for capacity in self.capacities):
            raise UserError("--memory-limit needs a GPU: on a CPU there is no device memory to limit")

    @property
    def grid(self) -> Grid:
        """The lengths that may be tried."""
        return Grid(self.granularity, self.longest)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "base": self.base.as_dict(),
            "granularity": self.granularity,
            "capacities": list(self.capacities),
            "start": self.start,
            "longest": self.longest,
            "confirm": self.confirm,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BoundarySpec:
        """The spec of a manifest."""
        fields = dict(values)
        fields["base"] = SweepSpec.from_dict(fields["base"])
        fields["capacities"] = tuple(fields["capacities"])
        return cls(**fields)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes from ``"40GiB,64GiB"``; GB and MiB are read too. Raises `UserError`."""
    units = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb)\s*", part.lower())
        if match is None or float(match[1]) == 0:
            raise UserError(f"--memory-limit {text}: {part!r} is not a size; write 40GiB,64GiB")
        sizes.append(round(float(match[1]) * units[match[2]]))
    return tuple(sizes)


def observe(record: Record) -> Observation:
    """What a record means to a search."""
    memory = record["memory"] or {}
    factors = record["factors"]
    return Observation(
        length=factors["seq_len_tokens"],
        outcome=Outcome(record["outcome"]["status"]),
        peak_bytes=memory.get("reserved_peak_bytes"),
        capacity_bytes=factors["capacity_emulated_bytes"] or memory.get("device_total_bytes"),
        detail=record["outcome"]["status_detail"],
    )


def search(
    spec: BoundarySpec, variant: str, capacity: int | None, run_trial: Callable[[Trial, int], Record]
) -> Boundary:
    """Run one search to its end; `run_trial(trial, number)` runs a trial or finds its record."""
    history: list[Observation] = []
    while True:
        length = next_length(history, spec.grid, spec.start, spec.confirm)
        if length is None:
            return conclude(history, spec.grid, variant, capacity, spec.confirm)
        point = make_point(spec.base, variant, length, Phase.MEMORY, capacity)
        repeat = sum(o.length == length for o in history)
        history.append(observe(run_trial(Trial(point, repeat), len(history) + 1)))


def find_boundaries(spec: BoundarySpec, runner: Runner) -> list[Boundary]:
    """Search for every variant and capacity, running what has no record yet."""
    return [
        search(spec, variant, capacity, lambda trial, number: runner.run(trial, number, 0))
        for capacity in spec.capacities
        for variant in spec.base.variants
    ]


def recorded_boundaries(spec: BoundarySpec, records: Sequence[Record]) -> list[Boundary]:
    """What the records of a finished or interrupted search say. Runs nothing, imports no variant."""
    found = []
    for capacity in spec.capacities:
        for variant in spec.base.variants:
            history = [
                observe(record)
                for record in latest(records)
                if record["factors"]["variant"] == variant
                and record["factors"]["capacity_emulated_bytes"] == capacity
            ]
            if history:
                found.append(conclude(history, spec.grid, variant, capacity, spec.confirm))
    return found
