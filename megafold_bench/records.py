"""The schema of a run folder's records, and how they are read.

A run folder holds ``manifest.json`` (written once: what was asked, where) and ``results.jsonl`` (one
line per trial, only ever appended to). Bytes and seconds throughout. A measured value that is missing
is null, and ``unavailable`` says why.

A line that is not whole JSON is what a full disk or a power cut leaves behind: it is skipped with a
`ResultsWarning`. A record of a newer schema is refused with a `UserError`, since reading it wrongly is
worse than not reading it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from megafold_bench.errors import UserError
from megafold_bench.variants import Scalar

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
RESULTS_NAME = "results.jsonl"


class ResultsWarning(UserWarning):
    """Part of a results file could not be read."""


class Factors(TypedDict):
    """Every factor of a point. Their canonical JSON is the point's identity."""

    variant: str
    seq_len_tokens: int
    phase: str  # "time" or "memory"
    device: str  # "cpu" or "cuda" (also ROCm)
    seed: int
    steps: int  # measured steps
    warmup_steps: int  # steps before them, the first one included
    world_size: int
    world_size_emulated: int | None
    capacity_emulated_bytes: int | None
    alloc_conf: str | None  # PYTORCH_ALLOC_CONF the worker ran with
    workload: dict[str, Scalar]  # what the variant's `resolve` returned: preset, cycles, precision…


class OutOfMemory(TypedDict):
    """The numbers in an out-of-memory message; null where the message does not give them."""

    tried_bytes: int | None
    free_bytes: int | None
    allocated_bytes: int | None
    reserved_unallocated_bytes: int | None


class OutcomeRecord(TypedDict):
    """How the trial ended; `status` is a value of `megafold_bench.outcomes.Outcome`."""

    status: str
    status_detail: str
    exit_code: int | None
    signal: str | None  # "SIGKILL"…
    failing_rank: int | None
    failing_step: int | None  # 0-based, warm-up steps included
    exception_type: str | None
    oom: OutOfMemory | None
    log_tail: str | None  # the last lines of the worker's output, for failures only
    snapshot: NotRequired[str]  # file, in the run folder, that says what held the memory as it ran out


Summary = dict[str, Any]
"""What `megafold_bench.statistics.summarise` returns: n, median, q1, q3, min, max, mean, std, ci95_lo, …"""


class TimeRecord(TypedDict):
    """Step times of a time-phase trial. Summaries are of the measured steps only.

    ``samples`` holds the raw values of the measured steps in order, under the same names; the warm-up
    steps, of which the first compiles, are under ``warmup_samples``. ``gpu_step_time_s`` (CUDA events) is null on CPU.
    """

    step_time_s: Summary | None  # load + transfer + step, synchronised, wall clock
    gpu_step_time_s: Summary | None
    data_wait_s: Summary | None
    h2d_s: Summary | None
    enqueue_s: Summary | None  # host time until the step call returned, before synchronising
    samples: dict[str, list[float]]
    warmup_samples: dict[str, list[float]]
    warmup_steps: int
    steady_from_step: int
    build_s: float
    first_step_s: float
    compile_s: float | None  # the first step minus the median step, never negative
    throughput_tokens_per_s: float | None
    samples_per_s: float | None


class RankMemory(TypedDict, total=False):
    """Peaks of one rank, in bytes. `peak_step` is the step after which the reserved peak stood."""

    allocated_peak_bytes: int | None
    requested_peak_bytes: int | None
    active_peak_bytes: int | None
    reserved_peak_bytes: int | None
    inactive_split_peak_bytes: int | None
    device_used_peak_bytes: int | None
    device_used_baseline_bytes: int | None
    device_total_bytes: int | None
    non_torch_bytes: int | None
    host_rss_peak_bytes: int | None
    host_rss_baseline_bytes: int | None
    pinned_peak_bytes: int | None
    alloc_retries: int | None
    num_ooms: int | None
    peak_step: int | None


class MemoryRecord(RankMemory, total=False):
    """Memory of a memory-phase trial: the maximum over ranks at the top, each rank under `ranks`."""

    ranks: list[RankMemory]
    steps: int


class Record(TypedDict):
    """One trial: what was run, how it ended, what was measured. One line of ``results.jsonl``."""

    schema_version: int
    run_id: str
    point_id: str  # first 16 hex digits of the sha256 of the canonical JSON of `factors`
    case_id: str  # the same without phase, steps and warmup_steps: joins time and memory trials
    trial_id: str  # "<point_id>-<repeat>"
    repeat: int
    attempt: int  # from 1; the latest attempt at a trial counts
    tier: str  # "measured", "emulated", …
    started_at: str  # ISO 8601, UTC
    ended_at: str
    wall_s: float  # monotonic clock, process start to end
    factors: Factors
    outcome: OutcomeRecord
    time: TimeRecord | None  # null in the memory phase and where nothing was measured
    memory: MemoryRecord | None  # null in the time phase
    telemetry: (
        dict[str, Any] | None
    )  # readings of the device sampler, each a value or {"unavailable": reason}
    losses: list[float | None]  # every step in order, warm-up included; null if not finite
    facts: dict[str, Any]  # the workload's facts: n_atoms, msa_depth, parameters, model_flops_per_step…
    provenance: dict[str, Any]  # of the worker: torch, device name and uuid, threads, allocator, gc policy
    quality: list[str]  # flags such as "alloc_retries", "clock_backwards", "unsteady"
    unavailable: dict[str, str]  # dotted field name → reason


class Manifest(TypedDict):
    """Written once when the run folder is made."""

    schema_version: int
    run_id: str
    kind: str  # "sweep" or "boundary"
    created_at: str
    spec: dict[str, Any]  # what was asked for; equal specs may resume one another
    argv: list[str]
    environment: dict[str, Any]  # `megafold_bench.environment.collect()`
    fixture: NotRequired[bool]  # true for records that nobody measured


def jsonable(value: Any) -> Any:
    """`value` with non-finite floats as None, tuples as lists and mappings as dicts: strict JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def _check_version(found: Any, where: str) -> None:
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{where} has schema_version {found!r}: it was not written by megafold-bench")
    if found > SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {found}, this megafold-bench reads up to {SCHEMA_VERSION}: "
            "upgrade megafold-bench to read it"
        )


def _parse(line: bytes, where: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (UnicodeDecodeError, json.JSONDecodeError):
        warnings.warn(f"{where} is torn ({len(line)} bytes): skipped", ResultsWarning, stacklevel=3)
        return None
    if not isinstance(value, dict):
        warnings.warn(f"{where} is not a record: skipped", ResultsWarning, stacklevel=3)
        return None
    return value


def read_results(path: Path) -> list[Record]:
    """Every record of a ``results.jsonl`` in file order, skipping torn lines with a `ResultsWarning`.

    A missing file is an empty run. Raises `UserError` for a newer schema or an unreadable file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    records: list[Record] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number},"
        value = _parse(line, where)
        if value is not None:
            _check_version(value.get("schema_version"), where)
            records.append(value)  # type: ignore[arg-type]
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """The record with the highest attempt of each trial, in the order the trials first appear."""
    newest: dict[str, Record] = {}
    for record in records:
        held = newest.get(record["trial_id"])
        if held is None or record["attempt"] >= held["attempt"]:
            newest[record["trial_id"]] = record
    return list(newest.values())


def read_manifest(run_dir: Path) -> Manifest:
    """The manifest of a run folder. Raises `UserError` if `run_dir` is not one or is of a newer schema."""
    path = run_dir / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        missing = "is not a run folder (it has no manifest.json)" if run_dir.is_dir() else "does not exist"
        raise UserError(f"{run_dir} {missing}: name a folder made by megafold-bench sweep") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it from a copy") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not a manifest: restore it from a copy")
    _check_version(manifest.get("schema_version"), str(path))
    return manifest  # type: ignore[return-value]
