"""The CPU as a device: host memory from /proc and package energy from RAPL where it may be read."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from megafold_bench.devices.base import (
    DeviceProcess,
    Identity,
    LinkTraffic,
    Memory,
    Reading,
    Settings,
    Unavailable,
)
from megafold_bench.devices.sysfs import read_number, read_text

KIB = 1024


def _colon_fields(content: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in content.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_model(proc: Path = Path("/proc")) -> Reading[str]:
    """The processor's marketing name; on Arm, where /proc has none, the machine type."""
    content = read_text(proc / "cpuinfo")
    if isinstance(content, Unavailable):
        return platform.processor() or content
    return _colon_fields(content).get("model name") or platform.machine()


def host_memory(proc: Path = Path("/proc")) -> Reading[Memory]:
    """Host memory, bytes; used is total minus what the kernel calls available."""
    content = read_text(proc / "meminfo")
    if isinstance(content, Unavailable):
        return content
    fields = _colon_fields(content)
    try:
        total, free = (int(fields[key].split()[0]) * KIB for key in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError) as error:
        return Unavailable(f"meminfo: no {error}")
    return Memory(total, total - free, free)


def process_rss_bytes(pid: int | str = "self", proc: Path = Path("/proc")) -> Reading[int]:
    """Resident set of one process, bytes."""
    content = read_text(proc / str(pid) / "statm")
    if isinstance(content, Unavailable):
        return content
    return int(content.split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Package:
    """One RAPL package: its counter wraps at `max_energy_range_uj`, so wraps are counted."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = read_number(folder / "max_energy_range_uj", 1e-6)
        self._last = 0.0
        self._wrapped = 0.0

    def energy_j(self) -> Reading[float]:
        now = read_number(self._file, 1e-6)
        if isinstance(now, Unavailable):
            return now
        if now < self._last and not isinstance(self._range, Unavailable):
            self._wrapped += self._range
        self._last = now
        return now + self._wrapped


class CpuDevice:
    """The host's processors and memory. Memory is the machine's; energy the sum over packages."""

    def __init__(
        self,
        proc: Path = Path("/proc"),
        powercap: Path = Path("/sys/class/powercap"),
        sys: Path = Path("/sys"),
    ) -> None:
        self._proc = proc
        self._sys = sys
        self._packages = [_Package(folder) for folder in sorted(powercap.glob("intel-rapl:[0-9]"))]
        self._times = self._cpu_times()

    @property
    def identity(self) -> Identity:
        """Model name, memory and instruction set."""
        memory = host_memory(self._proc)
        missing = Unavailable("a CPU has none")
        return Identity(
            vendor="cpu",
            name=cpu_model(self._proc),
            uuid=missing,
            pci_id=missing,
            total_bytes=memory if isinstance(memory, Unavailable) else memory.total_bytes,
            arch=platform.machine(),
            driver=platform.release(),
            source="proc",
        )

    @property
    def settings(self) -> Settings:
        """Nothing that /proc tells."""
        missing = Unavailable("not known for a CPU")
        return Settings(missing, missing, missing)

    def memory(self) -> Reading[Memory]:
        """The whole host's memory."""
        return host_memory(self._proc)

    def power_w(self) -> Reading[float]:
        """RAPL has a counter only; power follows from its difference."""
        return Unavailable("power: a CPU gives energy only")

    def energy_j(self) -> Reading[float]:
        """Sum of the packages' RAPL counters; most systems let only root read them."""
        if not self._packages:
            return Unavailable("energy: no RAPL counters in /sys/class/powercap")
        total = 0.0
        for package in self._packages:
            energy = package.energy_j()
            if isinstance(energy, Unavailable):
                return energy
            total += energy
        return total

    def _cpu_times(self) -> Reading[tuple[int, int]]:
        content = read_text(self._proc / "stat")
        if isinstance(content, Unavailable):
            return content
        ticks = [int(field) for field in content.splitlines()[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]

    def utilisation(self) -> Reading[float]:
        """Busy share of all cores since the last call."""
        before, now = self._times, self._cpu_times()
        self._times = now
        if isinstance(before, Unavailable) or isinstance(now, Unavailable):
            return Unavailable("utilisation: /proc/stat cannot be read")
        total = now[0] - before[0]
        if total <= 0:
            return Unavailable("utilisation: no clock tick since the last call")
        return 1.0 - (now[1] - before[1]) / total

    def sm_clock_hz(self) -> Reading[float]:
        """Current frequency of the first core."""
        return read_number(self._sys / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 1e3)

    def memory_clock_hz(self) -> Reading[float]:
        """Not told."""
        return Unavailable("memory clock: not known for a CPU")

    def temperature_c(self) -> Reading[float]:
        """The package sensor of the kernel's thermal zones."""
        for zone in sorted((self._sys / "class/thermal").glob("thermal_zone*")):
            if read_text(zone / "type") in ("x86_pkg_temp", "cpu-thermal", "cpu_thermal"):
                return read_number(zone / "temp", 1e-3)
        return Unavailable("temperature: no CPU thermal zone")

    def throttle_reasons(self) -> Reading[tuple[str, ...]]:
        """Not told."""
        return Unavailable("throttle reasons: not known for a CPU")

    def link_traffic(self) -> Reading[LinkTraffic]:
        """A CPU has no host link."""
        return Unavailable("link traffic: a CPU has no host link")

    def processes(self) -> Reading[tuple[DeviceProcess, ...]]:
        """Every process runs on the CPU; the question has no useful answer."""
        return Unavailable("processes: every process runs on the CPU")

    def close(self) -> None:
        """Nothing to give back."""
