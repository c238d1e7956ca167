"""Trials gathered into cells: one series (a variant and what else sets it apart) at one length."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from megafold_bench.outcomes import Outcome
from megafold_bench.records import Record
from megafold_bench.statistics import Interval, hierarchical_interval
from reports.energy import step_energy
from reports.fields import group, time_samples
from reports.units import bytes_text

# Factors that may set series apart beside the variant. Length, phase, repeats and counts do not.
SERIES_FACTORS = ("device", "world_size", "world_size_emulated", "capacity_emulated_bytes", "alloc_conf")
MEMORY_FIELDS = (
    "allocated_peak_bytes", "requested_peak_bytes", "active_peak_bytes", "reserved_peak_bytes",
    "inactive_split_peak_bytes", "device_used_peak_bytes", "non_torch_bytes", "host_rss_peak_bytes",
    "alloc_retries",
)  # fmt: skip
NOT_RUN = (Outcome.UNSUPPORTED, Outcome.SKIPPED_DOMINATED)

FLAG_MEANING = {
    "throttled": "the device lowered its clocks for more than 5 % of the time",
    "foreign_process": "another process used the device, or over 1 GiB of it was in use before",
    "allocator_retries": "the allocator freed its cache and retried: slower than it should be",
    "over_capacity": "it passed with more memory than the emulated card has: what lies outside the allocator grew",
    "unsteady": "step times still drifted by 2 % or more",
    "outliers": "some steps lie more than 10 scaled median deviations off (kept in all numbers)",
    "clock_backwards": "the system clock went backwards",
    "mixed_outcomes": "repeats of this point ended differently",
    "memory_varies": "peak memory differs between repeats by more than 2 MiB and 0.5 %",
}


def outcome_of(record: Record) -> Outcome:
    """The outcome of a record; one this version does not know counts as an error."""
    try:
        return Outcome(record["outcome"]["status"])
    except ValueError:
        return Outcome.ERROR


@dataclass(frozen=True)
class Times:
    """Step times of one cell: the median over all steps of all processes, in seconds.

    `interval` is the 95 % hierarchical bootstrap interval; `processes` the raw steps of each process.
    """

    processes: tuple[tuple[float, ...], ...]
    interval: Interval
    q1: float
    q3: float

    @property
    def median(self) -> float:
        """Median step time."""
        return self.interval.estimate

    @property
    def n_steps(self) -> int:
        """Steps of all processes together."""
        return sum(len(process) for process in self.processes)


@dataclass(frozen=True)
class Cell:
    """What is known of one series at one length. Absent measurements are None, never zero.

    `memory` holds the largest value over repeats (and ranks) of each memory field, in bytes.
    """

    series: str
    variant: str
    seq_len: int
    tier: str
    factors: Mapping[str, Any]
    outcome: Outcome
    detail: str
    statuses: tuple[str, ...]
    time: Times | None
    gpu_time_s: float | None
    data_wait_s: float | None
    tokens_per_s: float | None
    memory: Mapping[str, int | None]
    memory_spread_bytes: int | None
    capacity_bytes: int | None
    energy_j: float | None
    energy_method: str
    flags: tuple[str, ...]

    @property
    def peak_bytes(self) -> int | None:
        """The memory that runs out: reserved on a device, resident on the host."""
        reserved = self.memory.get("reserved_peak_bytes")
        return reserved if self.on_device else self.memory.get("host_rss_peak_bytes")

    @property
    def on_device(self) -> bool:
        """Whether device memory is what counts."""
        return self.factors.get("device") != "cpu"

    @property
    def doubtful(self) -> bool:
        """Whether a flag asks for care (a hollow marker)."""
        return bool(self.flags)


def _workload(record: Record) -> Mapping[str, Any]:
    return record["factors"].get("workload") or {}


def _varying(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(group, name) of each factor that takes several values at one variant and length, or, for the
    factors that do not follow the length, anywhere within one variant. An option that an older record does not
    have is another value too: nobody knows that it ran as the default of today."""
    by_variant: dict[tuple[str, str, Any], set[str]] = defaultdict(set)
    options: dict[tuple[str, int], set[str]] = defaultdict(set)
    for record in records:
        options[record["factors"]["variant"], record["factors"]["seq_len_tokens"]].update(_workload(record))
    for record in records:
        factors: Mapping[str, Any] = record["factors"]
        variant, length = factors["variant"], factors["seq_len_tokens"]
        by_variant[("tier", "tier", variant)].add(json.dumps(record.get("tier")))
        for name in SERIES_FACTORS:
            by_variant[("factors", name, variant)].add(json.dumps(factors.get(name)))
        for name in options[variant, length]:
            by_variant[("workload", name, (variant, length))].add(json.dumps(_workload(record).get(name)))
    return sorted({(group, name) for (group, name, _), values in by_variant.items() if len(values) > 1})


def _value(record: Record, group: str, name: str) -> Any:
    if group == "tier":
        return record.get("tier")
    source: Mapping[str, Any] = record["factors"] if group == "factors" else _workload(record)
    return source.get(name)


def _part(name: str, value: Any) -> str:
    if name == "world_size":
        return f"{value} GPU" + ("s" if value != 1 else "")
    if name == "world_size_emulated":
        return f"of {value}" if value else ""
    if name == "capacity_emulated_bytes":
        return f"limit {bytes_text(value)}" if value else "no limit"
    if name in ("tier", "device"):
        return str(value)
    return "" if value is None else f"{name}={value}"


def _times(records: Sequence[Record]) -> Times | None:
    processes = []
    for record in records:
        finite = tuple(time_samples(record))
        if finite and outcome_of(record).is_ok:
            processes.append(finite)
    if not processes:
        return None
    pooled = np.concatenate([np.asarray(process) for process in processes])
    q1, q3 = np.percentile(pooled, (25, 75))
    return Times(tuple(processes), hierarchical_interval(processes), float(q1), float(q3))


def _median_of(records: Sequence[Record], name: str) -> float | None:
    pooled: list[float] = []
    for record in records:
        if outcome_of(record).is_ok:
            pooled += time_samples(record, name)
    return float(np.median(pooled)) if pooled else None


def _tokens_per_s(records: Sequence[Record], times: Times | None) -> float | None:
    """Tokens of a step, as the record counted them, over the median of all processes."""
    for record in records:
        time = group(record, "time")
        rate, summary = time.get("throughput_tokens_per_s"), time.get("step_time_s") or {}
        if times is not None and rate and summary.get("median"):
            return float(rate * summary["median"] / times.median)
    return None


def _worst(records: Sequence[Record]) -> tuple[Outcome, str]:
    """A memory failure before another failure, a failure before pressure, pressure before success."""

    def rank(record: Record) -> int:
        outcome = outcome_of(record)
        if outcome.is_memory:
            return 0
        if outcome in NOT_RUN:
            return 2
        return {Outcome.OK: 4, Outcome.OK_PRESSURE: 3}.get(outcome, 1)

    record = min(records, key=rank)
    return outcome_of(record), record["outcome"].get("status_detail") or ""


def _memory(records: Sequence[Record]) -> tuple[dict[str, int | None], int | None]:
    found = [r["memory"] for r in records if r.get("memory") and outcome_of(r).is_ok]
    largest: dict[str, int | None] = {}
    for field in MEMORY_FIELDS:
        values = [memory[field] for memory in found if memory and memory.get(field) is not None]  # type: ignore[literal-required]
        largest[field] = max(values, default=None)
    peaks = [m.get("reserved_peak_bytes") or m.get("host_rss_peak_bytes") for m in found if m]
    known = [peak for peak in peaks if peak is not None]
    return largest, (max(known) - min(known)) if len(known) > 1 else None


def _capacity(records: Sequence[Record]) -> int | None:
    emulated = records[0]["factors"].get("capacity_emulated_bytes")
    if emulated:
        return emulated
    totals = [group(record, "memory").get("device_total_bytes") for record in records]
    return max((total for total in totals if total), default=None)


def _flags(
    records: Sequence[Record], memory: Mapping[str, int | None], spread: int | None
) -> tuple[str, ...]:
    """The records' own flags, and those that only show over several records."""  # fmt: skip
    flags = {flag for record in records for flag in record.get("quality") or []}
    timed = [record for record in records if time_samples(record)]  # clocks matter to times only
    if any((group(record, "telemetry").get("throttle_fraction") or 0) > 0.05 for record in timed):
        flags.add("throttled")
    if memory.get("alloc_retries"):
        flags.add("allocator_retries")
    if len({outcome_of(record).is_ok for record in records if outcome_of(record) not in NOT_RUN}) > 1:
        flags.add("mixed_outcomes")
    reserved = memory.get("reserved_peak_bytes")  # resident host memory is never the same twice
    if spread is not None and reserved and spread > max(2 << 20, 0.005 * reserved):
        flags.add("memory_varies")
    return tuple(sorted(flags))


def cell_of(series: str, records: Sequence[Record]) -> Cell:
    """The cell that these records, all of one point, make together."""
    timed = [r for r in records if r["factors"]["phase"] == "time"]
    times = _times(timed)
    memory, spread = _memory(records)
    outcome, detail = _worst(records)
    energies = [e for e in (step_energy(r) for r in records if outcome_of(r).is_ok) if e is not None]
    first = records[0]
    return Cell(
        series=series,
        variant=first["factors"]["variant"],
        seq_len=first["factors"]["seq_len_tokens"],
        tier=first.get("tier") or "measured",
        factors=dict(first["factors"]),
        outcome=outcome,
        detail=detail,
        statuses=tuple(record["outcome"]["status"] for record in records),
        time=times,
        gpu_time_s=_median_of(timed, "gpu_step_time_s"),
        data_wait_s=_median_of(timed, "data_wait_s"),
        tokens_per_s=_tokens_per_s(timed, times),
        memory=memory,
        memory_spread_bytes=spread,
        capacity_bytes=_capacity(records),
        energy_j=float(np.median([e.joules for e in energies])) if energies else None,
        energy_method="/".join(sorted({e.method for e in energies})),
        flags=_flags(records, memory, spread),
    )


def series_names(records: Sequence[Record]) -> list[str]:
    """The series of each record: its variant, and whatever else sets two of the same variant apart."""
    varying = _varying(records)
    names = []
    for record in records:
        parts = [_part(name, _value(record, group, name)) for group, name in varying]
        names.append(" · ".join([record["factors"]["variant"], *(part for part in parts if part)]))
    return names


def cells(records: Iterable[Record]) -> list[Cell]:
    """Cells of a run, in the order in which their series first appear, then by length.

    The time and memory trials of a point share a cell. Series are named by `series_names`.
    """
    held = list(records)
    groups: dict[str, dict[int, list[Record]]] = {}
    for record, series in zip(held, series_names(held), strict=True):
        groups.setdefault(series, {}).setdefault(record["factors"]["seq_len_tokens"], []).append(record)
    return [cell_of(series, lengths[n]) for series, lengths in groups.items() for n in sorted(lengths)]


def by_series(found: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Cells of each series by rising length, series in the order given."""
    result: dict[str, list[Cell]] = {}
    for cell in found:
        result.setdefault(cell.series, []).append(cell)
    return {series: sorted(group, key=lambda cell: cell.seq_len) for series, group in result.items()}


def as_frame(found: Iterable[Cell]) -> pd.DataFrame:
    """Cells as a table, one row each, SI units in the column names."""
    rows = []
    for cell in found:
        time = cell.time
        rows.append(
            {
                "series": cell.series,
                "variant": cell.variant,
                "seq_len_tokens": cell.seq_len,
                "tier": cell.tier,
                "outcome": cell.outcome.value,
                "outcome_detail": cell.detail,
                "step_time_median_s": time.median if time else None,
                "step_time_ci95_lo_s": time.interval.lo if time else None,
                "step_time_ci95_hi_s": time.interval.hi if time else None,
                "step_time_q1_s": time.q1 if time else None,
                "step_time_q3_s": time.q3 if time else None,
                "n_processes": len(time.processes) if time else 0,
                "n_steps": time.n_steps if time else 0,
                "gpu_step_time_median_s": cell.gpu_time_s,
                "data_wait_median_s": cell.data_wait_s,
                "throughput_tokens_per_s": cell.tokens_per_s,
                "energy_per_step_j": cell.energy_j,
                "energy_method": cell.energy_method,
                **cell.memory,
                "peak_memory_spread_bytes": cell.memory_spread_bytes,
                "capacity_bytes": cell.capacity_bytes,
                "flags": ";".join(cell.flags),
            }
        )
    return pd.DataFrame(rows)
