"""A boundary search: what was asked for, its trials in fresh processes, and what earlier records say.

`megafold_bench.bracket` chooses the lengths. Each probe is a memory trial of as few steps as still show
the peak. Where memory is known from earlier records (the sweep before it, another run, or the same
search at another capacity), the search begins next to the boundary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megafold_bench.bracket import PROBES_ABOVE, Boundary, Grid, conclude, next_length
from megafold_bench.errors import UserError
from megafold_bench.growth import NOTHING, Knowledge, Observation
from megafold_bench.measure.memory import PEAK_STEPS
from megafold_bench.outcomes import Outcome
from megafold_bench.points import Phase, Point, Trial
from megafold_bench.records import Record, latest
from megafold_bench.seeds import Seed, knowledge, seeds_from
from megafold_bench.sweep import MEMORY_WARMUP, Runner, SweepSpec, make_point


@dataclass(frozen=True)
class BoundarySpec:
    """What a boundary search was asked for. `base` gives variants, options, device and limits."""

    base: SweepSpec
    granularity: int = 32
    capacities: tuple[int | None, ...] = (None,)
    start: int | None = None
    longest: int = 8192
    confirm: int = 2
    probe_steps: int = PEAK_STEPS
    """Optimiser steps of a probe."""
    probes_above: int = PROBES_ABOVE
    seeds: tuple[Seed, ...] = ()
    """What earlier runs say of the variants. Kept here so that a resumed search takes the same course."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        _ = self.grid
        if self.confirm < 1:
            raise UserError(f"--confirm {self.confirm}: must be at least 1")
        if self.probe_steps < PEAK_STEPS:
            raise UserError(
                f"--probe-steps {self.probe_steps}: must be at least {PEAK_STEPS}: the first step allocates "
                "the optimiser's state, so the peak is seen from the second on"
            )
        if self.probes_above < 0:
            raise UserError(f"--probes-above {self.probes_above}: must be at least 0")
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
            "probe_steps": self.probe_steps,
            "probes_above": self.probes_above,
            "seeds": [asdict(seed) for seed in self.seeds],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BoundarySpec:
        """The spec of a manifest."""
        fields = dict(values)
        fields["base"] = SweepSpec.from_dict(fields["base"])
        fields["capacities"] = tuple(fields["capacities"])
        fields["seeds"] = tuple(Seed(**seed) for seed in fields.get("seeds", ()))
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
    """What a record means to a search. The capacity is what its allocator could have reserved."""
    memory = record["memory"] or {}
    factors = record["factors"]
    emulated, total = factors["capacity_emulated_bytes"], memory.get("device_total_bytes")
    if emulated is not None:
        capacity: int | None = emulated - (record["provenance"].get("capacity_overhead_bytes") or 0)
    else:
        capacity = None if total is None else total - (memory.get("non_torch_bytes") or 0)
    return Observation(
        length=factors["seq_len_tokens"],
        outcome=Outcome(record["outcome"]["status"]),
        peak_bytes=memory.get("reserved_peak_bytes"),
        capacity_bytes=capacity,
        detail=record["outcome"]["status_detail"],
    )


def probe_point(spec: BoundarySpec, variant: str, length: int, capacity: int | None) -> Point:
    """The point of a probe: the memory phase, with the spec's number of steps."""
    point = make_point(spec.base, variant, length, Phase.MEMORY, capacity)
    return replace(point, steps=spec.probe_steps, warmup=MEMORY_WARMUP)


def search(
    spec: BoundarySpec,
    variant: str,
    capacity: int | None,
    run_trial: Callable[[Trial, int], Record],
    known: Knowledge = NOTHING,
) -> Boundary:
    """Run one search to its end; `run_trial(trial, number)` runs a trial or finds its record."""
    history: list[Observation] = []
    while True:
        length = next_length(history, spec.grid, spec.start, spec.confirm, known, spec.probes_above)
        if length is None:
            return conclude(history, spec.grid, variant, capacity, spec.confirm)
        point = probe_point(spec, variant, length, capacity)
        repeat = sum(o.length == length for o in history)
        history.append(observe(run_trial(Trial(point, repeat), len(history) + 1)))


def known_before(
    spec: BoundarySpec, variant: str, capacity: int | None, records: Sequence[Record] = ()
) -> Knowledge:
    """What is known of a boundary before its search: the spec's seeds, and this run's earlier searches.

    Searches run one after the other, so those before this one are whole, also in a resumed run.
    """
    order = [(limit, name) for limit in spec.capacities for name in spec.base.variants]
    earlier = set(order[: order.index((capacity, variant))])
    done = [
        record
        for record in records
        if (record["factors"]["capacity_emulated_bytes"], record["factors"]["variant"]) in earlier
    ]
    return knowledge((*spec.seeds, *seeds_from(done, spec.base)), variant, capacity)


def find_boundaries(spec: BoundarySpec, runner: Runner) -> list[Boundary]:
    """Search for every variant and capacity, running what has no record yet."""
    found = []
    for capacity in spec.capacities:
        for variant in spec.base.variants:
            known = known_before(spec, variant, capacity, runner.records)
            found.append(
                search(spec, variant, capacity, lambda trial, number: runner.run(trial, number, 0), known)
            )
    return found


def history_of(records: Sequence[Record], variant: str, capacity: int | None) -> list[Observation]:
    """What the records of a search say of one variant at one capacity, in the order they were made."""
    return [
        observe(record)
        for record in latest(records)
        if record["factors"]["variant"] == variant
        and record["factors"]["capacity_emulated_bytes"] == capacity
    ]


def recorded_boundaries(spec: BoundarySpec, records: Sequence[Record]) -> list[Boundary]:
    """What the records of a finished or interrupted search say. Runs nothing, imports no variant."""
    found = []
    for capacity in spec.capacities:
        for variant in spec.base.variants:
            history = history_of(records, variant, capacity)
            if history:
                found.append(conclude(history, spec.grid, variant, capacity, spec.confirm))
    return found
