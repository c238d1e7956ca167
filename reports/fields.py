"""Reading a record's groups, any of which may be null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megafold_bench.records import Record


def group(record: Record, name: str) -> Mapping[str, Any]:
    """The group `name` (``"time"``, ``"memory"`` …) of a record; empty where it is null or absent."""
    found: Mapping[str, Any] | None = record.get(name)  # type: ignore[assignment]
    return found or {}


def time_samples(record: Record, name: str = "step_time_s") -> list[float]:
    """Raw values of the measured steps in order; empty where there are none."""
    found = (group(record, "time").get("samples") or {}).get(name) or []
    return [float(value) for value in found if value is not None]
