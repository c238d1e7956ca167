"""Peak memory of one rank: the allocator's own peaks on a GPU, the high-water mark of the host.

``allocated`` counts live tensors, ``active`` adds blocks that wait for a stream, ``reserved`` is what the
allocator holds from the device and what actually runs out. ``non_torch`` is what the device holds beside
it: context, library workspaces, and, on a shared device, other processes.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megafold_bench.errors import UserError
from megafold_bench.records import Record

PEAK_STEPS = 2
"""The first step allocates optimiser state, so the peak appears from the second on."""

MIN_STEPS = 3
"""Steps of a sweep's memory trial: one more than the peak needs, to see that it does not still grow."""


@dataclass
class Peaks:
    """Readings in bytes under their record names, and a reason for each that is missing."""

    values: dict[str, int | None] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


class MemoryMeter(Protocol):
    """Watches one kind of memory from before the build to after the last step."""

    def reset(self) -> None:
        """Begin: forget earlier peaks, note the baseline."""

    def after_step(self, index: int) -> None:
        """A step has finished."""

    def read(self) -> Peaks:
        """The peaks since `reset`."""


class HostMeter:
    """Resident memory of this process, from the kernel's high-water mark (Linux) or `getrusage`."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self._resets = False
        self._baseline: int | None = None

    def reset(self) -> None:
        """Note the resident size and, where the kernel allows it, reset the high-water mark."""
        self._baseline = self._status("VmRSS")
        try:
            (self._proc / "clear_refs").write_text("5")
            self._resets = True
        except OSError:
            self._resets = False

    def after_step(self, index: int) -> None:
        """The kernel keeps the mark."""

    def read(self) -> Peaks:
        """``host_rss_peak_bytes`` and ``host_rss_baseline_bytes``."""
        peaks = Peaks()
        peak = self._status("VmHWM")
        if peak is None:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if not self._resets:
            peaks.unavailable["memory.host_rss_peak_reset"] = (
                "the kernel's high-water mark cannot be reset here: the peak includes start-up"
            )
        peaks.values["host_rss_peak_bytes"] = peak
        peaks.values["host_rss_baseline_bytes"] = self._baseline
        if self._baseline is None:
            peaks.unavailable["memory.host_rss_baseline_bytes"] = "no /proc/self/status on this system"
        return peaks

    def _status(self, name: str) -> int | None:
        try:
            match = re.search(rf"^{name}:\s+(\d+) kB", (self._proc / "status").read_text(), re.MULTILINE)
        except OSError:
            return None
        return int(match[1]) * 1024 if match else None


_STATS = {
    "allocated_peak_bytes": "allocated_bytes.all.peak",
    "requested_peak_bytes": "requested_bytes.all.peak",
    "active_peak_bytes": "active_bytes.all.peak",
    "reserved_peak_bytes": "reserved_bytes.all.peak",
    "inactive_split_peak_bytes": "inactive_split_bytes.all.peak",
    "alloc_retries": "num_alloc_retries",
    "num_ooms": "num_ooms",
}


class CudaMeter:
    """PyTorch's caching allocator on the current CUDA or HIP device."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._baseline_used = 0
        self._used_peak = 0
        self._reserved_peak = -1
        self._peak_step: int | None = None

    def reset(self) -> None:
        """Reset the allocator's peaks and note what the device holds already."""
        self._cuda.init()
        self._cuda.reset_peak_memory_stats()
        self._baseline_used = self._used()

    def _used(self) -> int:
        free, total = self._cuda.mem_get_info()
        return int(total - free)

    def after_step(self, index: int) -> None:
        """Note what the device holds, and whether this step raised the reserved peak."""
        self._used_peak = max(self._used_peak, self._used())
        reserved = int(self._cuda.max_memory_reserved())
        if reserved > self._reserved_peak:
            self._reserved_peak, self._peak_step = reserved, index

    def read(self) -> Peaks:
        """The allocator's peaks; device use as seen at the ends of steps."""
        stats = self._cuda.memory_stats()
        peaks = Peaks({name: stats.get(key) for name, key in _STATS.items()})
        for name, key in _STATS.items():
            if peaks.values[name] is None:
                peaks.unavailable[f"memory.{name}"] = f"this allocator does not report {key}"
        used = max(self._used_peak, self._used())
        peaks.values |= {
            "device_used_peak_bytes": used,
            "device_used_baseline_bytes": self._baseline_used,
            "device_total_bytes": int(self._cuda.mem_get_info()[1]),
            "non_torch_bytes": self._used() - int(self._cuda.memory_reserved()),
            "peak_step": self._peak_step,
        }
        pinned = self._cuda.host_memory_stats().get("allocated_bytes.peak")
        peaks.values["pinned_peak_bytes"] = pinned
        if pinned is None:
            peaks.unavailable["memory.pinned_peak_bytes"] = "this torch does not report pinned memory"
        return peaks


def meters_for(device: str) -> list[MemoryMeter]:
    """The meters that apply on a kind of device."""
    meters: list[MemoryMeter] = [HostMeter()]
    if device == "cuda":
        import torch

        meters.append(CudaMeter(torch.cuda))
    return meters


CUDA_ONLY = (*_STATS, "device_used_peak_bytes", "device_total_bytes", "non_torch_bytes", "pinned_peak_bytes")


def add_memory(record: Record, meters: list[MemoryMeter], steps_done: int) -> None:
    """Put the meters' readings into a memory-phase record, as the one rank there is."""
    rank: dict[str, Any] = {}
    for meter in meters:
        peaks = meter.read()
        rank |= peaks.values
        record["unavailable"].update(peaks.unavailable)
    for name in CUDA_ONLY:
        if name not in rank:
            rank[name] = None
            record["unavailable"][f"memory.{name}"] = "measured on GPUs only"
    record["memory"] = {**rank, "ranks": [rank], "steps": steps_done}  # type: ignore[typeddict-item]


def add_sampled(record: Record) -> None:
    """Let the sampler's view of the device complete the meters': it also saw between the ends of steps.

    Its baseline was taken before the process touched the device, so the process's context is not in it.
    """
    found, telemetry = record["memory"], record["telemetry"]
    if found is None or telemetry is None or found.get("device_total_bytes") is None:
        return
    peak, baseline = telemetry["device_used_peak_bytes"], telemetry["device_used_baseline_bytes"]
    for view in (found, *found["ranks"]):
        if peak is not None:
            view["device_used_peak_bytes"] = max(peak, view["device_used_peak_bytes"] or 0)
        if baseline is not None:
            view["device_used_baseline_bytes"] = baseline


def emulate_capacity(cuda: Any, capacity_bytes: int, device: int = 0) -> int:
    """Let the allocator reserve no more than a card of `capacity_bytes` would leave it.

    What the device holds beside the allocator (context, library workspaces) is measured after a first
    matrix product and counts against the capacity. Returns that overhead in bytes. Raises `UserError` if the
    device is smaller than the capacity or the overhead alone fills it.
    """
    import torch

    cuda.init()
    one = torch.ones(64, 64, device=f"cuda:{device}")
    (one @ one).sum().item()
    free, total = cuda.mem_get_info(device)
    overhead = int(total - free) - int(cuda.memory_reserved(device))
    if capacity_bytes > total:
        raise UserError(
            f"--memory-limit {capacity_bytes / 2**30:g}GiB is more than the {total / 2**30:.1f} GiB of this device"
        )
    if overhead >= capacity_bytes:
        raise UserError(
            f"--memory-limit {capacity_bytes / 2**30:g}GiB is less than the {overhead / 2**30:.2f} GiB "
            "that this device holds outside the allocator"
        )
    del one
    cuda.empty_cache()
    cuda.set_per_process_memory_fraction((capacity_bytes - overhead) / total, device)
    return overhead


def allocator_setting() -> str | None:
    """The allocator's configuration in this process, under its current or its older names."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    return next((os.environ[name] for name in names if name in os.environ), None)
