from __future__ import annotations

import mmap
import sys

import pytest

from megafold_bench.measure.memory import CudaMeter, HostMeter, add_memory, add_sampled

MIB = 1 << 20


def blank() -> dict:
    return {"memory": None, "telemetry": None, "unavailable": {}}


def touch(size: int) -> None:
    """Use `size` bytes of new pages for a moment; an allocator might hand out pages that are resident already."""
    with mmap.mmap(-1, size) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_host_peak_is_that_of_the_trial_not_of_the_past():
    touch(200 * MIB)
    meter = HostMeter()
    meter.reset()
    touch(50 * MIB)
    peaks = meter.read()
    peak, baseline = peaks.values["host_rss_peak_bytes"], peaks.values["host_rss_baseline_bytes"]
    assert peak is not None and baseline is not None
    if "memory.host_rss_peak_reset" in peaks.unavailable:
        pytest.skip("this kernel does not let the mark be reset")
    assert 45 * MIB <= peak - baseline <= 80 * MIB


def test_host_without_proc_says_what_is_missing(tmp_path):
    meter = HostMeter(tmp_path / "none")
    meter.reset()
    peaks = meter.read()
    assert peaks.values["host_rss_peak_bytes"]
    assert set(peaks.unavailable) == {"memory.host_rss_peak_reset", "memory.host_rss_baseline_bytes"}


class FakeCuda:
    """An allocator whose reserved memory follows a script, one entry per look after a step."""

    def __init__(self, reserved):
        self._reserved = reserved
        self.now = 0

    def init(self): ...

    def reset_peak_memory_stats(self): ...

    def mem_get_info(self):
        return 1000 * MIB - self._reserved[self.now] - 100 * MIB, 1000 * MIB

    def memory_reserved(self):
        return self._reserved[self.now]

    def max_memory_reserved(self):
        return max(self._reserved[: self.now + 1])

    def memory_stats(self):
        return {"reserved_bytes.all.peak": self.max_memory_reserved(), "num_alloc_retries": 0}

    def host_memory_stats(self):
        return {"allocated_bytes.peak": 7}


def test_device_peaks():
    cuda = FakeCuda([0, 300 * MIB, 500 * MIB, 400 * MIB])
    meter = CudaMeter(cuda)
    meter.reset()
    for index in range(3):
        cuda.now = index + 1
        meter.after_step(index)
    record = blank()
    add_memory(record, [meter], 3)  # type: ignore[arg-type]
    memory = record["memory"]
    assert memory["reserved_peak_bytes"] == 500 * MIB
    assert memory["device_used_peak_bytes"] == 600 * MIB
    assert memory["device_used_baseline_bytes"] == 100 * MIB
    assert memory["non_torch_bytes"] == 100 * MIB
    assert memory["peak_step"] == 1
    assert memory["pinned_peak_bytes"] == 7
    assert memory["ranks"][0]["reserved_peak_bytes"] == 500 * MIB
    assert memory["allocated_peak_bytes"] is None
    assert "memory.allocated_peak_bytes" in record["unavailable"]

    record["telemetry"] = {"device_used_peak_bytes": 650 * MIB, "device_used_baseline_bytes": 5 * MIB}
    add_sampled(record)  # type: ignore[arg-type]
    assert record["memory"]["device_used_peak_bytes"] == 650 * MIB
    assert record["memory"]["ranks"][0]["device_used_baseline_bytes"] == 5 * MIB


def test_sampler_does_not_invent_device_memory_on_a_cpu():
    record = blank()
    add_memory(record, [HostMeter()], 3)  # type: ignore[arg-type]
    record["telemetry"] = {"device_used_peak_bytes": 1, "device_used_baseline_bytes": 1}
    add_sampled(record)  # type: ignore[arg-type]
    assert record["memory"]["device_used_peak_bytes"] is None
