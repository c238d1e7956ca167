"""AMD GPUs through AMD SMI (module `amdsmi`): ROCm's own copy first, then an installed package.

The library's keys and units changed between versions, and some wrappers disagree with their own
documentation; each getter says which it reads. Everything leaves in SI units.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megafold_bench.devices.base import (
    DeviceProcess,
    Identity,
    LinkTraffic,
    Memory,
    Reading,
    Settings,
    Unavailable,
    attempt,
    number,
    text,
)
from megafold_bench.devices.visible import Candidate

MIB = 1024 * 1024
DEFAULT_ROCM = Path("/opt/rocm")

# Counters of time spent held back, in amdsmi_get_gpu_metrics_info: a rise means throttling.
RESIDENCY_COUNTERS = {
    "prochot_residency_acc": "hw_slowdown",
    "ppt_residency_acc": "sw_power_cap",
    "socket_thm_residency_acc": "sw_thermal_slowdown",
    "vr_thm_residency_acc": "vr_thermal_slowdown",
    "hbm_thm_residency_acc": "memory_thermal_slowdown",
}
VIOLATIONS = {
    "active_prochot_thrm": "hw_slowdown",
    "active_ppt_pwr": "sw_power_cap",
    "active_socket_thrm": "sw_thermal_slowdown",
    "active_vr_thrm": "vr_thermal_slowdown",
    "active_hbm_thrm": "memory_thermal_slowdown",
}


def rocm_module_folder() -> Path:
    """Where ROCm keeps its Python binding."""
    return Path(os.environ.get("ROCM_PATH") or DEFAULT_ROCM) / "share" / "amd_smi"


@contextlib.contextmanager
def _first_on_path(folder: Path | None) -> Iterator[None]:
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if folder is not None:
            sys.path.remove(str(folder))


def _import_from(folder: Path | None) -> Any:
    """Import `amdsmi`; a failed import leaves no half-loaded submodules for the next attempt."""
    try:
        # Some packages print which paths they tried before they raise KeyError('libamd_smi.so').
        with _first_on_path(folder), contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("amdsmi")
    except BaseException:
        for name in [name for name in sys.modules if name == "amdsmi" or name.startswith("amdsmi.")]:
            del sys.modules[name]
        raise


def load_amdsmi() -> Reading[Any]:
    """The `amdsmi` module, initialised for GPUs, or why there is none.

    The library is left initialised until the process ends, as torch does: it counts no users, and
    shutting it down would take it from torch too.
    """
    module: Reading[Any]
    if "amdsmi" in sys.modules:
        module = sys.modules["amdsmi"]
    else:
        folder = rocm_module_folder()
        module = Unavailable(f"no {folder}")
        if folder.is_dir():
            module = attempt("ROCm's amdsmi", _import_from, folder)
        if isinstance(module, Unavailable):
            installed = attempt("installed amdsmi", _import_from, None)
            module = (
                Unavailable(f"amdsmi cannot be imported: {module.reason}; {installed.reason}")
                if isinstance(installed, Unavailable)
                else installed
            )
    if isinstance(module, Unavailable):
        return module
    with contextlib.redirect_stdout(io.StringIO()):
        started = attempt("AMD SMI", lambda: module.amdsmi_init(module.AmdSmiInitFlags.INIT_AMD_GPUS))
    return started if isinstance(started, Unavailable) else module


def watts(raw: Any, what: str) -> Reading[float]:
    """Power in watts from W, mW or µW: a GPU draws and may draw 5 W to 5 kW, so the unit shows itself."""
    value = number(raw, what)
    if isinstance(value, Unavailable):
        return value
    return value * (1.0 if value < 5e3 else 1e-3 if value < 5e6 else 1e-6)


def first_value(info: Any, keys: Iterable[str], what: str) -> Reading[Any]:
    """The first of `keys` that holds a number, raw."""
    if not isinstance(info, dict):
        return Unavailable(f"{what}: the library gave {type(info).__name__}")
    for key in keys:
        if not isinstance(number(info.get(key), what), Unavailable):
            return info[key]
    return Unavailable(f"{what}: none of {', '.join(keys)} has a value")


def _serial_uuid(smi: Any, handle: Any) -> Reading[str]:
    """The UUID that ROCR_VISIBLE_DEVICES and torch use: ``GPU-`` and 16 hexadecimal digits."""
    serial = attempt("uuid", lambda: str(smi.amdsmi_get_gpu_asic_info(handle)["asic_serial"]))
    if isinstance(serial, Unavailable):
        return serial
    digits = serial.lower().removeprefix("0x")
    if not digits or set(digits) - set("0123456789abcdef"):
        return Unavailable(f"uuid: the library gave serial {serial!r}")
    return f"GPU-{digits.zfill(16)}"


def _order(smi: Any, handle: Any) -> Reading[int]:
    """Position among HIP's devices: `hip_id` from ROCm 6.4, else the KFD node number."""
    hip = attempt("hip_id", lambda: smi.amdsmi_get_gpu_enumeration_info(handle)["hip_id"])
    if not isinstance(hip, Unavailable):
        order = number(hip, "hip_id")
        if not isinstance(order, Unavailable):
            return int(order)
    node = attempt("KFD node", lambda: smi.amdsmi_get_gpu_kfd_info(handle)["node_id"])
    order = node if isinstance(node, Unavailable) else number(node, "KFD node")
    return order if isinstance(order, Unavailable) else int(order)


def candidates(smi: Any) -> list[Candidate]:
    """Every AMD GPU, in HIP's order; `key` is the PCI address.

    Where the library tells neither order, the PCI order stands.
    """
    rows: list[tuple[int, Candidate]] = []
    known = True
    for handle in smi.amdsmi_get_processor_handles():
        bdf = str(smi.amdsmi_get_gpu_device_bdf(handle))
        uuid = _serial_uuid(smi, handle)
        order = _order(smi, handle)
        known = known and not isinstance(order, Unavailable)
        rows.append(
            (
                0 if isinstance(order, Unavailable) else order,
                Candidate(bdf, f"BDF-{bdf}" if isinstance(uuid, Unavailable) else uuid),
            )
        )
    rows.sort(key=lambda row: (row[0], row[1].key) if known else (0, row[1].key))
    return [candidate for _, candidate in rows]


class AmdDevice:
    """One AMD GPU or partition, opened by PCI address (``0000:c1:00.0``)."""

    def __init__(self, smi: Any, bdf: str) -> None:
        self._smi = smi
        self._bdf = bdf
        wanted = bdf.lower()
        handles = {
            str(smi.amdsmi_get_gpu_device_bdf(handle)).lower(): handle
            for handle in smi.amdsmi_get_processor_handles()
        }
        if wanted not in handles:
            raise LookupError(f"no AMD GPU at {bdf}; there are {', '.join(sorted(handles)) or 'none'}")
        self._handle = handles[wanted]
        self._residency = self._residencies()

    def _ask(self, what: str, function: str, *arguments: Any) -> Reading[Any]:
        return attempt(what, lambda: getattr(self._smi, function)(self._handle, *arguments))

    def _field(self, what: str, function: str, key: str) -> Reading[str]:
        info = self._ask(what, function)
        if isinstance(info, Unavailable):
            return info
        return text(info.get(key) if isinstance(info, dict) else None, what)

    def _ask_enum(self, what: str, function: str, *names: tuple[str, str]) -> Reading[Any]:
        """Like `_ask`, with arguments named (enumeration, member), which older libraries may lack."""

        def call() -> Any:
            members = [getattr(getattr(self._smi, kind), member) for kind, member in names]
            return getattr(self._smi, function)(self._handle, *members)

        return attempt(what, call)

    @property
    def identity(self) -> Identity:
        """Name, UUID in ROCm's form, PCI address, VRAM, ``gfx942``, driver version."""
        uuid = _serial_uuid(self._smi, self._handle)
        memory = self.memory()
        return Identity(
            vendor="amd",
            name=self._field("name", "amdsmi_get_gpu_asic_info", "market_name"),
            uuid=self._ask("uuid", "amdsmi_get_gpu_device_uuid") if isinstance(uuid, Unavailable) else uuid,
            pci_id=self._bdf,
            total_bytes=memory if isinstance(memory, Unavailable) else memory.total_bytes,
            arch=self._field("arch", "amdsmi_get_gpu_asic_info", "target_graphics_version"),
            driver=self._field("driver", "amdsmi_get_gpu_driver_info", "driver_version"),
            source="amdsmi",
        )

    @property
    def settings(self) -> Settings:
        """Compute and memory partition (``SPX/NPS1``), ECC, power cap."""
        raw = [self._ask("partition", f"amdsmi_get_gpu_{kind}_partition") for kind in ("compute", "memory")]
        parts = [part if isinstance(part, Unavailable) else text(part, "partition") for part in raw]
        known = [part for part in parts if not isinstance(part, Unavailable)]
        missing = next((part for part in parts if isinstance(part, Unavailable)), None)
        ecc = self._ask("ECC", "amdsmi_get_gpu_ecc_enabled")
        mask = ecc if isinstance(ecc, Unavailable) else number(int(ecc), "ECC")
        cap = self._ask("power limit", "amdsmi_get_power_cap_info")
        value = cap if isinstance(cap, Unavailable) else first_value(cap, ["power_cap"], "power limit")
        return Settings(
            partition="/".join(known) if known or missing is None else missing,
            ecc=mask if isinstance(mask, Unavailable) else mask > 0,
            power_limit_w=value if isinstance(value, Unavailable) else watts(value, "power limit"),
        )

    def memory(self) -> Reading[Memory]:
        """VRAM from the call in bytes; where that is missing, from the one in MiB."""
        parts = []
        for call in ("amdsmi_get_gpu_memory_total", "amdsmi_get_gpu_memory_usage"):
            raw = self._ask_enum("memory", call, ("AmdSmiMemoryType", "VRAM"))
            parts.append(raw if isinstance(raw, Unavailable) else number(raw, "memory"))
        if any(isinstance(part, Unavailable) for part in parts):
            info = self._ask("memory", "amdsmi_get_gpu_vram_usage")
            if isinstance(info, Unavailable):
                return info
            parts = [number(info.get(key), "memory", MIB) for key in ("vram_total", "vram_used")]
        total, used = parts
        if isinstance(total, Unavailable):
            return total
        if isinstance(used, Unavailable):
            return used
        return Memory(int(total), int(used), int(total) - int(used))

    def power_w(self) -> Reading[float]:
        """Socket power. MI300X gives `socket_power`, and 'N/A' as its average."""
        info = self._ask("power", "amdsmi_get_power_info")
        if isinstance(info, Unavailable):
            return info
        keys = ("socket_power", "current_socket_power", "average_socket_power")
        raw = first_value(info, keys, "power")
        return raw if isinstance(raw, Unavailable) else watts(raw, "power")

    def energy_j(self) -> Reading[float]:
        """The accumulator times its resolution in microjoules. The second die of an MI250 counts nothing."""
        info = self._ask("energy", "amdsmi_get_energy_count")
        if isinstance(info, Unavailable):
            return info
        # `power` was the accumulator's name up to 6.2.4; from 6.4 there is only the new one.
        raw = first_value(info, ("energy_accumulator", "power"), "energy")
        resolution = first_value(info, ("counter_resolution",), "energy")
        if isinstance(raw, Unavailable):
            return raw
        if isinstance(resolution, Unavailable):
            return resolution
        if float(raw) == 0:
            return Unavailable("energy: the counter of this die stays at 0")
        return float(raw) * float(resolution) * 1e-6

    def utilisation(self) -> Reading[float]:
        """Graphics activity."""
        info = self._ask("utilisation", "amdsmi_get_gpu_activity")
        return (
            info if isinstance(info, Unavailable) else number(info.get("gfx_activity"), "utilisation", 1e-2)
        )

    def _clock(self, what: str, kind: str) -> Reading[float]:
        info = self._ask_enum(what, "amdsmi_get_clock_info", ("AmdSmiClkType", kind))
        if isinstance(info, Unavailable):
            return info
        raw = first_value(info, ("clk", "cur_clk"), what)
        return raw if isinstance(raw, Unavailable) else number(raw, what, 1e6)

    def sm_clock_hz(self) -> Reading[float]:
        """Graphics clock."""
        return self._clock("graphics clock", "GFX")

    def memory_clock_hz(self) -> Reading[float]:
        """Memory clock."""
        return self._clock("memory clock", "MEM")

    def temperature_c(self) -> Reading[float]:
        """Hotspot, else junction, else edge (MI300 has no edge sensor); some versions give m°C."""
        missing = Unavailable("temperature: no sensor")
        for sensor in ("HOTSPOT", "JUNCTION", "EDGE"):
            which = ("AmdSmiTemperatureType", sensor), ("AmdSmiTemperatureMetric", "CURRENT")
            raw = self._ask_enum(f"{sensor.lower()} temperature", "amdsmi_get_temp_metric", *which)
            reading = raw if isinstance(raw, Unavailable) else number(raw, "temperature")
            if not isinstance(reading, Unavailable):
                return reading * (1e-3 if reading > 1000 else 1.0)
            missing = reading
        return missing

    def _residencies(self) -> dict[str, float]:
        info = self._ask("throttle reasons", "amdsmi_get_gpu_metrics_info")
        if not isinstance(info, dict):
            return {}
        readings = {key: number(info.get(key), key) for key in RESIDENCY_COUNTERS}
        return {key: value for key, value in readings.items() if not isinstance(value, Unavailable)}

    def throttle_reasons(self) -> Reading[tuple[str, ...]]:
        """Residency counters that rose since the last call; without them, the violations active now.

        `amdsmi_get_violation_status` is the second choice because it sleeps between two readings.
        """
        before, now = self._residency, self._residencies()
        self._residency = now
        if now:
            return tuple(
                name
                for key, name in RESIDENCY_COUNTERS.items()
                if now.get(key, 0.0) > before.get(key, now.get(key, 0.0))
            )
        status = self._ask("throttle reasons", "amdsmi_get_violation_status")
        if isinstance(status, Unavailable):
            return status
        known = {key: status.get(key) for key in VIOLATIONS if isinstance(status.get(key), bool | int)}
        if not known:
            return Unavailable("throttle reasons: the library gave 'N/A'")
        return tuple(VIOLATIONS[key] for key, active in known.items() if active is True or active == 1)

    def link_traffic(self) -> Reading[LinkTraffic]:
        """Packets times packet size over one second. Blocks for that second."""
        info = self._ask("link traffic", "amdsmi_get_gpu_pci_throughput")
        if isinstance(info, Unavailable):
            return info
        values = [number(info.get(key), "link traffic") for key in ("received", "sent", "max_pkt_sz")]
        for part in values:
            if isinstance(part, Unavailable):
                return part
        received, sent, size = (float(info[key]) for key in ("received", "sent", "max_pkt_sz"))
        return LinkTraffic(rx_bytes_per_s=received * size, tx_bytes_per_s=sent * size)

    def _process(self, row: Any) -> DeviceProcess:
        # Versions before 6.2 list handles, to be looked up one by one.
        info = row if isinstance(row, dict) else self._smi.amdsmi_get_gpu_process_info(self._handle, row)
        usage = info.get("memory_usage") or {}
        used = number(usage.get("vram_mem", info.get("mem")), "process memory")
        return DeviceProcess(int(info["pid"]), used if isinstance(used, Unavailable) else int(used))

    def processes(self) -> Reading[tuple[DeviceProcess, ...]]:
        """Processes with the device open; a monitor shows here too, with no memory."""
        rows = self._ask("processes", "amdsmi_get_gpu_process_list")
        if isinstance(rows, Unavailable):
            return rows
        return attempt("processes", lambda: tuple(self._process(row) for row in rows))

    def close(self) -> None:
        """The library stays initialised: see `load_amdsmi`."""


def open_bdf(bdf: str) -> Reading[AmdDevice]:
    """The AMD GPU at this PCI address."""
    smi = load_amdsmi()
    if isinstance(smi, Unavailable):
        return smi
    return attempt(f"device {bdf}", AmdDevice, smi, bdf)
