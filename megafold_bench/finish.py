"""Complete a worker's record: statistics of its raw samples, and flags that ask for care in reading it.

Done by the sweep, not in the worker: it needs libraries that a measured process should not load.
"""

from __future__ import annotations

from datetime import datetime

from megafold_bench.measure.company import found_company
from megafold_bench.measure.steps import SERIES
from megafold_bench.outcomes import Outcome
from megafold_bench.records import Record, TimeRecord
from megafold_bench.statistics import quality_flags, summarise


def finish(record: Record) -> Record:
    """Fill in the statistics and the quality flags, in place. Returns the record."""
    if record["time"] is not None:
        _summarise_times(record, record["time"])
    flags = _flags(record)
    if over_capacity(record):
        flags.append("over_capacity")
    if datetime.fromisoformat(record["ended_at"]) < datetime.fromisoformat(record["started_at"]):
        flags.append("clock_backwards")
    record["quality"] += [flag for flag in flags if flag not in record["quality"]]
    return record


def over_capacity(record: Record) -> bool:
    """Whether a trial that passed held more than the card it emulates has.

    The allocator's limit is set as the trial begins, less what lies outside it then; that still grows by some 0.15 GiB
    while kernels are loaded and libraries take workspaces.
    """
    capacity, memory = record["factors"]["capacity_emulated_bytes"], record["memory"]
    if capacity is None or memory is None or not Outcome(record["outcome"]["status"]).is_ok:
        return False
    return (memory.get("reserved_peak_bytes") or 0) + (memory.get("non_torch_bytes") or 0) > capacity


def _flags(record: Record) -> list[str]:
    """What the samples, the allocator and the device's sampler say. Clocks matter to times only."""
    samples = record["time"]["samples"].get("step_time_s", []) if record["time"] else []
    telemetry = record["telemetry"] or {}
    foreign = telemetry.get("foreign_processes") or 0
    in_company = found_company(
        foreign, record["factors"]["device"], telemetry.get("device_used_baseline_bytes")
    )
    return list(
        quality_flags(
            samples,
            throttle_fraction=telemetry.get("throttle_fraction") if samples else None,
            foreign_processes=max(foreign, int(in_company)),
            allocator_retries=(record["memory"] or {}).get("alloc_retries") or 0,
        )
    )


def _summarise_times(record: Record, times: TimeRecord) -> None:
    samples, warmup = times["samples"], times["warmup_samples"]
    for name in SERIES:
        values = samples.get(name)
        times[name] = summarise(values).as_dict() if values else None  # type: ignore[literal-required]
        if not values:
            ended_early = name in warmup
            record["unavailable"][f"time.{name}"] = (
                "the trial ended before a measured step"
                if ended_early
                else "the device has no clock of its own: see step_time_s"
            )
    times["first_step_s"] = [*warmup["step_time_s"], *samples.get("step_time_s", [])][0]
    times["steady_from_step"] = times["warmup_steps"]
    summary = times["step_time_s"]
    median = summary["median"] if summary else None
    times["compile_s"] = None if median is None else max(0.0, times["first_step_s"] - median)
    times["throughput_tokens_per_s"] = (
        None if median is None else record["factors"]["seq_len_tokens"] / median
    )
    times["samples_per_s"] = None if median is None else 1.0 / median
