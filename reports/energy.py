"""Energy of a step from a record's telemetry."""

from __future__ import annotations

from dataclasses import dataclass

from megafold_bench.records import Record
from reports.fields import group, time_samples


@dataclass(frozen=True)
class StepEnergy:
    """Joules of one training step; `method` is ``"counter"`` or ``"integrated"`` (power over time)."""

    joules: float
    method: str


def step_energy(record: Record) -> StepEnergy | None:
    """Energy of one measured step of a time trial, or None where the device gave none.

    Telemetry holds the energy of the whole steady window, in which the measured steps ran back to back.
    A counter that failed its check against integrated power does not count; the integral does.
    """
    if record["factors"]["phase"] != "time":
        return None
    energy = group(record, "telemetry").get("energy") or {}
    joules, method = energy.get("energy_j"), energy.get("method") or ""
    steps = len(time_samples(record))
    if joules is None or not steps or (method == "counter" and energy.get("valid") is False):
        return None
    return StepEnergy(joules / steps, method)
