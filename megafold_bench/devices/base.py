"""One interface over GPUs and CPUs: every reading is a value or `Unavailable` with a reason.

Units are SI and stand in the names: bytes, watts, joules, hertz, bytes per second; temperature is in
degrees Celsius (`_c`), utilisation a fraction from 0 to 1. Nothing here changes a device's settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Unavailable:
    """A reading that this device, driver or library cannot give; `reason` says why."""

    reason: str

    def __bool__(self) -> bool:
        return False


Reading: TypeAlias = T | Unavailable


def value_or_none(reading: Reading[T]) -> T | None:
    """The value, or None where there is none (for records, beside their list of reasons)."""
    return None if isinstance(reading, Unavailable) else reading


@dataclass(frozen=True)
class Identity:
    """What a device is. Fixed for its life."""

    vendor: str
    name: Reading[str]
    uuid: Reading[str]
    pci_id: Reading[str]
    total_bytes: Reading[int]
    arch: Reading[str]
    driver: Reading[str]
    source: str


@dataclass(frozen=True)
class Settings:
    """How a device is set up by its administrator: read, never written.

    `partition` is the MIG profile or mode on NVIDIA and the compute and memory partition on AMD.
    """

    partition: Reading[str]
    ecc: Reading[bool]
    power_limit_w: Reading[float]


@dataclass(frozen=True)
class Memory:
    """Device memory in bytes, everybody's together.

    `reserved_bytes` is what the driver keeps for itself where the library tells (NVML v2), else None.
    """

    total_bytes: int
    used_bytes: int
    free_bytes: int
    reserved_bytes: int | None = None


@dataclass(frozen=True)
class LinkTraffic:
    """Traffic over the host link (PCIe), bytes per second, as seen from the device."""

    rx_bytes_per_s: float
    tx_bytes_per_s: float


@dataclass(frozen=True)
class DeviceProcess:
    """A process that holds the device. In a container the id may be the host's."""

    pid: int
    used_bytes: Reading[int]


class Device(Protocol):
    """What the sampler, the records and `doctor` ask of a device. No method raises for a missing reading."""

    @property
    def identity(self) -> Identity:
        """What the device is."""

    @property
    def settings(self) -> Settings:
        """How the device is set up."""

    def memory(self) -> Reading[Memory]:
        """Memory used and total, bytes."""

    def power_w(self) -> Reading[float]:
        """Power draw, watts."""

    def energy_j(self) -> Reading[float]:
        """Cumulative energy counter, joules since some fixed moment."""

    def utilisation(self) -> Reading[float]:
        """Share of recent time with at least one kernel running, 0 to 1."""

    def sm_clock_hz(self) -> Reading[float]:
        """Clock of the compute units, hertz."""

    def memory_clock_hz(self) -> Reading[float]:
        """Clock of the memory, hertz."""

    def temperature_c(self) -> Reading[float]:
        """Hottest core temperature the library gives, degrees Celsius."""

    def throttle_reasons(self) -> Reading[tuple[str, ...]]:
        """Why clocks are held below what was asked for; empty when they are not."""

    def link_traffic(self) -> Reading[LinkTraffic]:
        """Host link traffic, bytes per second. May block for tens of milliseconds."""

    def processes(self) -> Reading[tuple[DeviceProcess, ...]]:
        """Compute processes on the device."""

    def close(self) -> None:
        """Give back library handles. The device must not be read afterwards."""


class UnavailableDevice:
    """A device that could not be opened: every reading says why."""

    def __init__(self, vendor: str, reason: str) -> None:
        self._missing = Unavailable(reason)
        self._vendor = vendor

    @property
    def identity(self) -> Identity:
        """The vendor if known; nothing else."""
        missing = self._missing
        return Identity(self._vendor, missing, missing, missing, missing, missing, missing, "none")

    @property
    def settings(self) -> Settings:
        """Unavailable."""
        return Settings(self._missing, self._missing, self._missing)

    def _unavailable(self) -> Unavailable:
        return self._missing

    memory = power_w = energy_j = utilisation = sm_clock_hz = memory_clock_hz = _unavailable
    temperature_c = throttle_reasons = link_traffic = processes = _unavailable

    def close(self) -> None:
        """Nothing to give back."""


# Values with which the vendors' libraries say "no value": every all-ones width, and the signed ones.
SENTINELS = frozenset({0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF})
_MISSING_TEXT = frozenset({"", "N/A", "NA", "NONE", "NOT SUPPORTED", "[N/A]", "[NOT SUPPORTED]", "UNKNOWN"})


def number(raw: Any, what: str, scale: float = 1.0) -> Reading[float]:
    """`raw` times `scale` as a float, or `Unavailable` for 'N/A', None, all-ones, NaN or other text."""
    if raw is None or isinstance(raw, bool):
        return Unavailable(f"{what}: the library gave {raw!r}")
    if isinstance(raw, str):
        try:
            raw = float(raw.split()[0]) if raw.strip().upper() not in _MISSING_TEXT else None
        except ValueError:
            return Unavailable(f"{what}: the library gave {raw!r}")
        if raw is None:
            return Unavailable(f"{what}: the library gave 'N/A'")
    try:
        value = float(raw)
    except (TypeError, ValueError):
        return Unavailable(f"{what}: the library gave {raw!r}")
    if not math.isfinite(value) or raw in SENTINELS:
        return Unavailable(f"{what}: the library gave {raw!r}, which means no value")
    return value * scale


def text(raw: Any, what: str) -> Reading[str]:
    """`raw` as text (bytes decoded), or `Unavailable` for 'N/A', None or nothing."""
    if isinstance(raw, bytes):
        raw = raw.decode("utf-8", errors="replace")
    if raw is None or str(raw).strip().upper() in _MISSING_TEXT:
        return Unavailable(f"{what}: the library gave {raw!r}")
    return str(raw).strip()


def attempt(what: str, call: Callable[..., T], *arguments: Any) -> Reading[T]:
    """`call(*arguments)`; whatever the vendor library raises becomes the reason.

    Vendor bindings raise their own classes for "not supported", but also KeyError, AttributeError (an
    older library) and OSError; all mean that there is no reading, so all are caught and named.
    """
    try:
        return call(*arguments)
    except Exception as error:
        return Unavailable(f"{what}: {type(error).__name__}: {error}".rstrip(": "))
