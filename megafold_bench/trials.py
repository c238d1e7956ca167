"""What a sweep hands to a worker process, and the record that both fill in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megafold_bench.outcomes import Verdict
from megafold_bench.points import Point, Trial
from megafold_bench.records import SCHEMA_VERSION, Record


@dataclass(frozen=True)
class WorkerRequest:
    """One attempt at one trial. The worker leaves its record at `record_path`."""

    trial: Trial
    run_id: str
    attempt: int
    record_path: Path
    log_path: Path
    started_at: str
    started_monotonic_s: float
    sample_interval_s: float | None = None
    """Interval of the device sampler; None to run without one."""
    snapshot: bool = False
    """Whether to keep a summary of what held the memory, if an allocation fails."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What this package is, as `host.own_source` has it: a run may be resumed with another version."""

    @property
    def samples_path(self) -> Path:
        """Where the device sampler writes."""
        return self.record_path.parent.parent / "samples" / f"{self.trial.trial_id}.{self.attempt}.jsonl"

    @property
    def snapshot_path(self) -> Path:
        """Where the summary of a failed allocation goes."""
        return self.record_path.parent.parent / "snapshots" / f"{self.trial.trial_id}.{self.attempt}.json"

    def to_json(self) -> str:
        """One line; `from_json` reads it."""
        return json.dumps(
            {
                "factors": self.trial.point.factors,
                "repeat": self.trial.repeat,
                "run_id": self.run_id,
                "attempt": self.attempt,
                "record_path": str(self.record_path),
                "log_path": str(self.log_path),
                "started_at": self.started_at,
                "started_monotonic_s": self.started_monotonic_s,
                "sample_interval_s": self.sample_interval_s,
                "snapshot": self.snapshot,
                "source": dict(self.source),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> WorkerRequest:
        """The request that `to_json` wrote."""
        values = json.loads(text)
        point = Point.from_factors(values.pop("factors"))
        return cls(
            trial=Trial(point, values.pop("repeat")),
            record_path=Path(values.pop("record_path")),
            log_path=Path(values.pop("log_path")),
            **values,
        )


def utc_now() -> str:
    """The wall clock as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def blank_record(request: WorkerRequest, verdict: Verdict) -> Record:
    """The record of a trial that ended with `verdict`, before anything measured is filled in."""
    point = request.trial.point
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": request.run_id,
        "point_id": point.point_id,
        "case_id": point.case_id,
        "trial_id": request.trial.trial_id,
        "repeat": request.trial.repeat,
        "attempt": request.attempt,
        "tier": "measured",
        "started_at": request.started_at,
        "ended_at": utc_now(),
        "wall_s": 0.0,
        "factors": point.factors,
        "outcome": {
            "status": "",
            "status_detail": "",
            "exit_code": None,
            "signal": None,
            "failing_rank": None,
            "failing_step": None,
            "exception_type": None,
            "oom": None,
            "log_tail": None,
            **verdict_fields(verdict),  # type: ignore[typeddict-item]
        },
        "time": None,
        "memory": None,
        "telemetry": None,
        "losses": [],
        "facts": {},
        "provenance": {"source": dict(request.source)} if request.source else {},
        "quality": [],
        "unavailable": {},
    }


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """The part of an outcome record that a verdict decides."""
    fields = asdict(verdict)
    return {
        "status": verdict.outcome.value,
        "status_detail": fields["detail"],
        "exception_type": fields["exception_type"],
        "oom": fields["oom"],
    }
