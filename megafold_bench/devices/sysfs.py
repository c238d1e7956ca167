"""AMD GPUs through the kernel's own files (`amdgpu` in /sys), for machines without a working AMD SMI.

hwmon counts in microwatts, microjoules, millidegrees and hertz.
"""

from __future__ import annotations

from pathlib import Path

from megafold_bench.devices.base import (
    DeviceProcess,
    Identity,
    LinkTraffic,
    Memory,
    Reading,
    Settings,
    Unavailable,
    number,
    text,
)

AMD_VENDOR = "0x1002"


def read_text(path: Path) -> Reading[str]:
    """The stripped content of a small kernel file, or why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return Unavailable(f"{path.name}: {error.strerror or error}")


def read_number(path: Path, scale: float = 1.0) -> Reading[float]:
    """The number in a small kernel file, times `scale`."""
    raw = read_text(path)
    return raw if isinstance(raw, Unavailable) else number(raw, path.name, scale)


def amd_folders(root: Path = Path("/sys/class/drm")) -> list[Path]:
    """Device folders of the AMD GPUs that report their memory, by PCI address."""
    found: dict[str, Path] = {}
    for card in root.glob("card*/device"):
        folder = card.resolve()
        if read_text(folder / "vendor") == AMD_VENDOR and (folder / "mem_info_vram_total").exists():
            found[folder.name] = folder
    return [found[name] for name in sorted(found)]


class SysfsDevice:
    """One AMD GPU read from `folder`, its device folder in /sys."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        monitors = sorted((folder / "hwmon").glob("hwmon*"))
        self._hwmon = monitors[0] if monitors else folder / "hwmon" / "missing"

    @property
    def identity(self) -> Identity:
        """PCI address, unique id and memory; the kernel knows no marketing name on most cards."""
        unique = read_text(self._folder / "unique_id")
        name = read_text(self._folder / "product_name")
        total = read_number(self._folder / "mem_info_vram_total")
        return Identity(
            vendor="amd",
            name=name if isinstance(name, Unavailable) else text(name, "product_name"),
            uuid=unique if isinstance(unique, Unavailable) else f"GPU-{unique}",
            pci_id=self._folder.name,
            total_bytes=total if isinstance(total, Unavailable) else int(total),
            arch=Unavailable("arch: not in sysfs"),
            driver=read_text(Path("/sys/module/amdgpu/version")),
            source="sysfs",
        )

    @property
    def settings(self) -> Settings:
        """Compute and memory partition, and the power cap."""
        parts = [read_text(self._folder / f"current_{kind}_partition") for kind in ("compute", "memory")]
        known = [part for part in parts if not isinstance(part, Unavailable)]
        return Settings(
            partition="/".join(known) if known else Unavailable("partition: not in sysfs"),
            ecc=Unavailable("ECC: not in sysfs"),
            power_limit_w=read_number(self._hwmon / "power1_cap", 1e-6),
        )

    def memory(self) -> Reading[Memory]:
        """VRAM used and total."""
        total = read_number(self._folder / "mem_info_vram_total")
        used = read_number(self._folder / "mem_info_vram_used")
        if isinstance(total, Unavailable):
            return total
        if isinstance(used, Unavailable):
            return used
        return Memory(int(total), int(used), int(total) - int(used))

    def power_w(self) -> Reading[float]:
        """hwmon average power, or the instantaneous one where only that exists."""
        average = read_number(self._hwmon / "power1_average", 1e-6)
        return (
            read_number(self._hwmon / "power1_input", 1e-6) if isinstance(average, Unavailable) else average
        )

    def energy_j(self) -> Reading[float]:
        """hwmon energy counter, which few cards have."""
        return read_number(self._hwmon / "energy1_input", 1e-6)

    def utilisation(self) -> Reading[float]:
        """Busy share as the kernel driver samples it."""
        return read_number(self._folder / "gpu_busy_percent", 1e-2)

    def sm_clock_hz(self) -> Reading[float]:
        """Shader clock."""
        return read_number(self._hwmon / "freq1_input")

    def memory_clock_hz(self) -> Reading[float]:
        """Memory clock."""
        return read_number(self._hwmon / "freq2_input")

    def temperature_c(self) -> Reading[float]:
        """Junction temperature (sensor 2) where there is one, else the edge's (sensor 1)."""
        junction = read_number(self._hwmon / "temp2_input", 1e-3)
        return (
            read_number(self._hwmon / "temp1_input", 1e-3) if isinstance(junction, Unavailable) else junction
        )

    def throttle_reasons(self) -> Reading[tuple[str, ...]]:
        """Not in sysfs."""
        return Unavailable("throttle reasons: not in sysfs")

    def link_traffic(self) -> Reading[LinkTraffic]:
        """Not read: the kernel's pcie_bw file counts packets and blocks for a second."""
        return Unavailable("link traffic: sysfs counts packets, not bytes, and blocks for a second")

    def processes(self) -> Reading[tuple[DeviceProcess, ...]]:
        """Not in the device's folder."""
        return Unavailable("processes: not in sysfs")

    def close(self) -> None:
        """Nothing to give back."""
