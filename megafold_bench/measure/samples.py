"""The sampler's file: one JSON document a line, readable by hand and after a kill.

Line 1 is the header; then come samples, each a list ``[device, time_ns, latency_ns, used_bytes]`` (a fast
one) or that and the columns of `SLOW`; now and then ``{"device", "time_ns", "ours", "others"}``, which says
which processes hold the device; the last is a footer with the sampler's own cost. A file without a footer, or with a torn last line, is a sampler that was killed: its samples stand.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megafold_bench.devices.base import Reading, Unavailable
from megafold_bench.errors import UserError
from megafold_bench.measure.company import Company, foreign_processes
from megafold_bench.measure.energy import Energy, window_energy

SCHEMA = 2
SLOW = (
    "power_w",
    "energy_j",
    "utilisation",
    "sm_clock_hz",
    "memory_clock_hz",
    "temperature_c",
    "throttle_reasons",
    "link_rx_bytes",
    "link_tx_bytes",
)


@dataclass
class DeviceSamples:
    """One device's columns. The slow columns have times of their own; a missing value is None."""

    selector: str
    times_ns: list[int] = field(default_factory=list)
    latencies_ns: list[int] = field(default_factory=list)
    used_bytes: list[int | None] = field(default_factory=list)
    slow_times_ns: list[int] = field(default_factory=list)
    slow: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SLOW})
    company: list[Company] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleFile:
    """A read sampler file. Wall time of a sample is ``wall_anchor_s + (time_ns − monotonic_anchor_ns)/1e9``."""

    interval_s: float
    wall_anchor_s: float
    monotonic_anchor_ns: int
    devices: tuple[DeviceSamples, ...]
    footer: dict[str, Any] | None
    torn: bool


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of a column over a window."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Temperatures:
    """Degrees Celsius at the start and end of a window, and the greatest within."""

    start: float
    end: float
    max: float


@dataclass(frozen=True)
class DeviceSummary:
    """One device over one window. The baseline is the first sample of the file, whatever the window.

    `throttle_fraction` is the share of samples with at least one reason; `throttle_reasons` gives the
    share of each. `link_*_bytes` are the rise over the window. `foreign_processes` counts over the whole file.
    """

    selector: str
    window_s: float
    samples: int
    device_used_baseline_bytes: Reading[int]
    device_used_peak_bytes: Reading[int]
    power_w: Reading[Spread]
    sm_clock_hz: Reading[Spread]
    memory_clock_hz: Reading[Spread]
    utilisation: Reading[Spread]
    temperature_c: Reading[Temperatures]
    throttle_fraction: Reading[float]
    throttle_reasons: Reading[dict[str, float]]
    link_rx_bytes: Reading[int]
    link_tx_bytes: Reading[int]
    foreign_processes: Reading[int]
    energy: Energy
    latency_s: Reading[Spread]

    def as_record(self) -> dict[str, Any]:
        """JSON-serialisable: null for what is missing, and ``unavailable{path: reason}``."""
        missing: dict[str, str] = {}
        plain: dict[str, Any] = _plain(vars(self), "", missing)
        plain["unavailable"] = missing
        return plain


def _plain(value: Any, path: str, missing: dict[str, str]) -> Any:
    if isinstance(value, Unavailable):
        missing[path] = value.reason
        return None
    if isinstance(value, Energy):
        value = vars(value)
    if isinstance(value, Spread | Temperatures):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(part, f"{path}.{key}" if path else key, missing) for key, part in value.items()}
    return value


def read_samples(path: Path) -> SampleFile:
    """Read a sampler's file, up to a torn last line.

    Raises `UserError` for a file that is no sampler file or has a newer schema.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    header = _parse(lines[0])
    if not isinstance(header, dict) or "selectors" not in header:
        raise UserError(f"{path} is not a file of device samples")
    if header["schema"] > SCHEMA:
        raise UserError(f"{path} has schema {header['schema']}, newer than {SCHEMA}: update megafold-bench")
    devices = tuple(
        DeviceSamples(selector, unavailable=header["unavailable"][i])
        for i, selector in enumerate(header["selectors"])
    )
    footer = None
    torn = lines[-1] != ""
    for line in lines[1:]:
        row = _parse(line)
        if isinstance(row, dict) and "others" in row:
            devices[row["device"]].company.append(Company(row["ours"], tuple(row["others"])))
        elif isinstance(row, dict):
            footer = row
        elif isinstance(row, list):
            _append(devices[row[0]], row)
        elif line:
            torn = True
            break
    return SampleFile(
        header["interval_s"], header["wall_anchor_s"], header["monotonic_anchor_ns"], devices, footer, torn
    )


def _parse(line: str) -> Any:
    try:
        return json.loads(line) if line else None
    except json.JSONDecodeError:
        return None


def _append(device: DeviceSamples, row: list[Any]) -> None:
    device.times_ns.append(row[1])
    device.latencies_ns.append(row[2])
    device.used_bytes.append(row[3])
    if len(row) == 4 + len(SLOW):
        device.slow_times_ns.append(row[1])
        for name, value in zip(SLOW, row[4:], strict=True):
            device.slow[name].append(value)


def summarise_device(
    device: DeviceSamples, start_ns: int | None = None, end_ns: int | None = None
) -> DeviceSummary:
    """One device over [start, end] in ``time.monotonic_ns``; None is the first or last sample."""
    times = device.times_ns or [0]
    start, end = times[0] if start_ns is None else start_ns, times[-1] if end_ns is None else end_ns
    inside = [i for i, t in enumerate(device.times_ns) if start <= t <= end]
    used = [device.used_bytes[i] for i in inside if device.used_bytes[i] is not None]
    slow = [i for i, t in enumerate(device.slow_times_ns) if start <= t <= end]
    columns = {
        name: [device.slow[name][i] for i in slow if device.slow[name][i] is not None] for name in SLOW
    }

    def spread(name: str) -> Reading[Spread]:
        values = columns[name]
        return _spread(values) if values else _missing(device, name)

    first = next((value for value in device.used_bytes if value is not None), None)
    reasons = columns["throttle_reasons"]
    temperatures = columns["temperature_c"]
    names = sorted({name for sample in reasons for name in sample})
    window = max(end - start, 1)
    return DeviceSummary(
        selector=device.selector,
        window_s=(end - start) * 1e-9,
        samples=len(inside),
        device_used_baseline_bytes=_missing(device, "used_bytes") if first is None else first,
        device_used_peak_bytes=max(v for v in used if v is not None)
        if used
        else _missing(device, "used_bytes"),
        power_w=spread("power_w"),
        sm_clock_hz=spread("sm_clock_hz"),
        memory_clock_hz=spread("memory_clock_hz"),
        utilisation=spread("utilisation"),
        temperature_c=Temperatures(temperatures[0], temperatures[-1], max(temperatures))
        if temperatures
        else _missing(device, "temperature_c"),
        throttle_fraction=sum(map(bool, reasons)) / len(reasons)
        if reasons
        else _missing(device, "throttle_reasons"),
        throttle_reasons={name: sum(name in sample for sample in reasons) / len(reasons) for name in names}
        if reasons
        else _missing(device, "throttle_reasons"),
        link_rx_bytes=_rise(device, "link_rx_bytes", columns),
        link_tx_bytes=_rise(device, "link_tx_bytes", columns),
        foreign_processes=foreign_processes(device.company)
        if device.company
        else _missing(device, "processes"),
        energy=window_energy(
            device.slow_times_ns, device.slow["power_w"], device.slow["energy_j"], start, start + window
        ),
        latency_s=_spread([device.latencies_ns[i] * 1e-9 for i in inside])
        if inside
        else Unavailable("no sample in the window"),
    )


def _spread(values: list[float]) -> Spread:
    return Spread(float(np.median(values)), float(min(values)), float(max(values)))


def _rise(device: DeviceSamples, name: str, columns: dict[str, list[Any]]) -> Reading[int]:
    """How far a cumulative counter rose within the window."""
    values = columns[name]
    if len(values) < 2:
        return _missing(device, name)
    if any(after < before for before, after in pairwise(values)):
        return Unavailable(f"{name}: the counter wrapped")
    return int(values[-1] - values[0])


def _missing(device: DeviceSamples, column: str) -> Unavailable:
    return Unavailable(device.unavailable.get(column, f"{column}: no sample in the window"))
