"""Energy of a step from a record's telemetry, whichever way the device could give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megafold_bench.records import Record


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list):  # one value for each device
        parts = [_number(part) for part in value]
        known = [part for part in parts if part is not None]
        return sum(known) if known and len(known) == len(parts) else None
    if isinstance(value, Mapping):
        for key in ("value", "median", "gpu", "total"):
            if key in value:
                return _number(value[key])
    return None


def energy_per_step_j(record: Record) -> float | None:
    """Joules of one training step over all devices of the trial; None where no counter gave them.

    Reads ``telemetry.energy_per_step_j``: a number, a list with one for each device, or a mapping that
    holds either under ``value`` or ``gpu``. A counter that telemetry marks as not valid does not count.
    """
    telemetry = record.get("telemetry") or {}
    if telemetry.get("energy_counter_valid") is False:
        return None
    return _number(telemetry.get("energy_per_step_j"))
