"""NVIDIA devices through NVML (`nvidia-ml-py`, module `pynvml`).

NVML counts in milliwatts, millijoules, megahertz and kilobytes per second; conversions to SI happen
here and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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

# Bits of nvmlDeviceGetCurrentClocksEventReasons. Idle, application clocks, sync boost and display
# clocks are not throttling: nothing holds the clock below what load and setting ask for.
THROTTLE_BITS = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x200: "board_limit",
    0x400: "reliability",
}


def load_nvml() -> Reading[Any]:
    """The `pynvml` module with NVML initialised, or why there is none.

    Each successful call must be matched by one ``nvmlShutdown``; NVML counts them.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except Exception as error:
        return Unavailable(
            f"pynvml cannot be imported ({type(error).__name__}: {error}); install nvidia-ml-py"
        )
    if not hasattr(nvml, "_nvmlGetFunctionPointer"):
        return Unavailable(
            "the old package 'pynvml' (11 or older) shadows nvidia-ml-py; uninstall pynvml, then reinstall nvidia-ml-py"
        )
    started = attempt("NVML", nvml.nvmlInit)
    return started if isinstance(started, Unavailable) else nvml


def _decoded(raw: Any) -> str:
    return raw.decode() if isinstance(raw, bytes) else str(raw)


def _place(nvml: Any, handle: Any, parent_uuid: str) -> tuple[str, int, int]:
    gpu, compute = nvml.nvmlDeviceGetGpuInstanceId(handle), nvml.nvmlDeviceGetComputeInstanceId(handle)
    return parent_uuid, int(gpu), int(compute)


def _slices(nvml: Any, parent: Any, parent_uuid: str) -> tuple[Candidate, ...]:
    """MIG instances of a GPU in MIG mode, in NVML's order; none where MIG is off or unknown."""
    mode = attempt("MIG mode", lambda: nvml.nvmlDeviceGetMigMode(parent)[0])
    if mode != 1:
        return ()
    found = []
    for index in range(int(nvml.nvmlDeviceGetMaxMigDeviceCount(parent))):
        handle = attempt("MIG", nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent, index)
        if isinstance(handle, Unavailable):
            continue
        uuid = _decoded(nvml.nvmlDeviceGetUUID(handle))
        place = attempt("MIG instance", _place, nvml, handle, parent_uuid)
        found.append(Candidate(uuid, uuid, slice_of=None if isinstance(place, Unavailable) else place))
    return tuple(found)


def candidates(nvml: Any) -> list[Candidate]:
    """Every GPU that NVML shows, in PCI order."""
    found = []
    for index in range(int(nvml.nvmlDeviceGetCount())):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _decoded(nvml.nvmlDeviceGetUUID(handle))
        name = _decoded(nvml.nvmlDeviceGetName(handle))
        found.append(Candidate(uuid, uuid, name, _slices(nvml, handle, uuid)))
    return found


class NvidiaDevice:
    """One GPU or MIG instance, opened by UUID. Owns one NVML initialisation until `close`.

    A MIG instance has memory and processes of its own; power, clocks, temperature and throttling are
    its GPU's, and NVML gives no energy for it.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._uuid = uuid
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._mig = uuid.upper().startswith("MIG-")
        self._board = (
            nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle) if self._mig else self._handle
        )

    def _number(self, what: str, call: Callable[[], Any], scale: float = 1.0) -> Reading[float]:
        raw = attempt(what, call)
        return raw if isinstance(raw, Unavailable) else number(raw, what, scale)

    def _text(self, what: str, call: Callable[[], Any]) -> Reading[str]:
        raw = attempt(what, call)
        return raw if isinstance(raw, Unavailable) else text(raw, what)

    @property
    def identity(self) -> Identity:
        """Name, UUID, PCI address, memory, compute capability as ``sm_90``, driver."""
        nvml, board = self._nvml, self._board
        capability = attempt("arch", lambda: nvml.nvmlDeviceGetCudaComputeCapability(board))
        memory = self.memory()
        return Identity(
            vendor="nvidia",
            name=self._text("name", lambda: nvml.nvmlDeviceGetName(self._handle)),
            uuid=self._uuid,
            pci_id=self._text("PCI address", lambda: nvml.nvmlDeviceGetPciInfo(board).busId),
            total_bytes=memory if isinstance(memory, Unavailable) else memory.total_bytes,
            arch=capability
            if isinstance(capability, Unavailable)
            else f"sm_{int(capability[0])}{int(capability[1])}",
            driver=self._text("driver", nvml.nvmlSystemGetDriverVersion),
            source="nvml",
        )

    @property
    def settings(self) -> Settings:
        """MIG, ECC and the enforced power limit."""
        nvml, board = self._nvml, self._board
        mode = attempt("MIG mode", lambda: nvml.nvmlDeviceGetMigMode(board)[0])
        partition: Reading[str]
        if isinstance(mode, Unavailable):
            partition = mode
        elif self._mig:
            partition = self._text("MIG profile", lambda: nvml.nvmlDeviceGetName(self._handle))
        else:
            partition = "mig" if mode == 1 else "none"
        ecc = attempt("ECC", lambda: bool(nvml.nvmlDeviceGetEccMode(board)[0]))
        limit = self._number("power limit", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(board), 1e-3)
        return Settings(partition, ecc, limit)

    def memory(self) -> Reading[Memory]:
        """NVML memory, version 2 where there is one: used excludes what the driver reserves."""
        nvml = self._nvml
        what = "memory"
        info = attempt(what, lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle, version=nvml.nvmlMemory_v2))
        if isinstance(info, Unavailable):
            info = attempt(what, lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle))
        if isinstance(info, Unavailable):
            return info
        total, used, free = (number(getattr(info, key, None), what) for key in ("total", "used", "free"))
        for part in (total, used, free):
            if isinstance(part, Unavailable):
                return part
        reserved = getattr(info, "reserved", None)
        return Memory(
            int(info.total), int(info.used), int(info.free), None if reserved is None else int(reserved)
        )

    def power_w(self) -> Reading[float]:
        """Board power; a one-second average on most GPUs since Ampere."""
        return self._number("power", lambda: self._nvml.nvmlDeviceGetPowerUsage(self._board), 1e-3)

    def energy_j(self) -> Reading[float]:
        """Energy since the driver was loaded; updates about every 100 ms."""
        if self._mig:
            return Unavailable("energy: NVML has no counter for a MIG instance")
        return self._number(
            "energy", lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board), 1e-3
        )

    def utilisation(self) -> Reading[float]:
        """Share of the last sampling period with a kernel running."""
        return self._number(
            "utilisation", lambda: self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu, 1e-2
        )

    def sm_clock_hz(self) -> Reading[float]:
        """Clock of the streaming multiprocessors."""
        nvml = self._nvml
        return self._number(
            "SM clock", lambda: nvml.nvmlDeviceGetClockInfo(self._board, nvml.NVML_CLOCK_SM), 1e6
        )

    def memory_clock_hz(self) -> Reading[float]:
        """Clock of the memory."""
        nvml = self._nvml
        return self._number(
            "memory clock", lambda: nvml.nvmlDeviceGetClockInfo(self._board, nvml.NVML_CLOCK_MEM), 1e6
        )

    def temperature_c(self) -> Reading[float]:
        """GPU core temperature."""
        nvml = self._nvml
        sensor = nvml.NVML_TEMPERATURE_GPU
        if hasattr(nvml, "nvmlDeviceGetTemperatureV"):
            reading = self._number("temperature", lambda: nvml.nvmlDeviceGetTemperatureV(self._board, sensor))
            if not isinstance(reading, Unavailable):
                return reading
        # The versioned call needs driver 570 or newer; the old one works on all.
        return self._number("temperature", lambda: nvml.nvmlDeviceGetTemperature(self._board, sensor))

    def throttle_reasons(self) -> Reading[tuple[str, ...]]:
        """Power, thermal and hardware causes that hold the clock down now."""
        nvml = self._nvml
        getter = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        getter = getter or getattr(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None)
        if getter is None:
            return Unavailable("throttle reasons: this pynvml has no such call")
        mask = attempt("throttle reasons", lambda: int(getter(self._board)))
        if isinstance(mask, Unavailable):
            return mask
        return tuple(name for bit, name in THROTTLE_BITS.items() if mask & bit)

    def link_traffic(self) -> Reading[LinkTraffic]:
        """PCIe traffic. NVML measures over 20 ms for each direction and blocks that long."""
        nvml, board = self._nvml, self._board

        def one(counter: str) -> Reading[float]:
            return self._number(
                "PCIe traffic", lambda: nvml.nvmlDeviceGetPcieThroughput(board, getattr(nvml, counter)), 1e3
            )

        tx, rx = one("NVML_PCIE_UTIL_TX_BYTES"), one("NVML_PCIE_UTIL_RX_BYTES")
        if isinstance(tx, Unavailable):
            return tx
        return rx if isinstance(rx, Unavailable) else LinkTraffic(rx_bytes_per_s=rx, tx_bytes_per_s=tx)

    def processes(self) -> Reading[tuple[DeviceProcess, ...]]:
        """Compute processes; in a container the ids are the host's."""
        rows = attempt("processes", lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if isinstance(rows, Unavailable):
            return rows
        found = []
        for row in rows:
            used = number(row.usedGpuMemory, "process memory")
            found.append(DeviceProcess(int(row.pid), used if isinstance(used, Unavailable) else int(used)))
        return tuple(found)

    def close(self) -> None:
        """Give back this device's NVML initialisation."""
        self._nvml.nvmlShutdown()


def open_uuid(uuid: str) -> Reading[NvidiaDevice]:
    """The GPU or MIG instance of this UUID."""
    nvml = load_nvml()
    if isinstance(nvml, Unavailable):
        return nvml
    device = attempt(f"device {uuid}", lambda: NvidiaDevice(nvml, uuid))
    if isinstance(device, Unavailable):
        nvml.nvmlShutdown()
    return device
