"""Device-timed repeats, the rise of memory, and what the device can do at most."""

import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP_MS = 25
REPEAT_MS = 100
CPU_REPEATS = 5
PROFILED_CALLS = 5


def time_calls(call: Callable[[], object], device: str, repeat_ms: int = REPEAT_MS) -> list[float]:
    """Seconds of every repeat after warm-up: between device events, with a cold L2 cache; wall time on a CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return [t * 1e-3 for t in do_bench(call, warmup=WARMUP_MS, rep=repeat_ms, return_mode="all")]
    return time_after(lambda: None, lambda _: call(), device, repeat_ms)


def time_after(
    prepare: Callable[[], Any], call: Callable[[Any], object], device: str, repeat_ms: int = REPEAT_MS
) -> list[float]:
    """Seconds of `call(prepare())` without `prepare`: a backward pass alone, after a forward pass of its own.

    As `do_bench` does it otherwise. Keeping one graph and walking it repeatedly would be shorter, but compiled
    backward passes reuse the memory of what the forward pass saved.
    """
    if device != "cuda":
        return _wall_times(prepare, call)
    from triton.runtime import driver

    cache = driver.active.get_empty_cache_for_benchmark()

    def once() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready = prepare()
        driver.active.clear_cache(cache)
        begin.record()
        call(ready)
        end.record()
        return begin, end

    once()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        once()
    torch.cuda.synchronize()
    estimate_s = (time.perf_counter() - began) / 3
    for _ in range(max(1, int(WARMUP_MS * 1e-3 / estimate_s))):
        once()
    events = [once() for _ in range(max(3, int(repeat_ms * 1e-3 / estimate_s)))]
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


def _wall_times(prepare: Callable[[], Any], call: Callable[[Any], object]) -> list[float]:
    call(prepare())
    times = []
    for _ in range(CPU_REPEATS):
        ready = prepare()
        began = time.perf_counter()
        call(ready)
        times.append(time.perf_counter() - began)
    return times


def peak_rise(call: Callable[[], Any], device: str) -> int | None:
    """Bytes by which allocated memory rises during a call, its results still held; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del held
    return peak


def kernel_seconds(call: Callable[[], Any], device: str) -> float | None:
    """Seconds that the device works in a call: its kernels and copies, with a warm L2 cache; None on a CPU.

    What a call takes above that it waits for the host.
    """
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED_CALLS):
            call()
        torch.cuda.synchronize()
    return sum(row.device_time_total for row in seen.key_averages()) * 1e-6 / PROFILED_CALLS


def measure_ceilings(device: str) -> dict[str, Any]:
    """Copy bandwidth (bytes read and written per second), matrix FLOP/s by dtype, exponentials per second.

    On a CPU, where no roofline is drawn, an empty dictionary.
    """
    if device != "cuda":
        return {}
    found: dict[str, Any] = {"copy_bytes_per_s": _copy_bytes_per_second(device), "matmul_flops_per_s": {}}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        found["matmul_flops_per_s"][name] = _matmul_flops_per_second(device, dtype)
    found["exps_per_s"] = _exponentials_per_second(device)
    return found


def _copy_bytes_per_second(device: str, size: int = 2**29) -> float:
    x = torch.empty(size, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    return 2 * size / _median(time_calls(lambda: y.copy_(x), device))


def _matmul_flops_per_second(device: str, dtype: torch.dtype) -> float:
    n = 4096 if dtype == torch.float32 else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _median(time_calls(lambda: a @ b, device))


def _exponentials_per_second(device: str) -> float:
    from optimized.kernels.exponentials import BLOCK, STEPS, exponentials_kernel

    programs = 64 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * BLOCK, dtype=torch.float32, device=device)
    elapsed = _median(time_calls(lambda: exponentials_kernel[(programs,)](out, STEPS, BLOCK), device))
    return out.numel() * STEPS / elapsed


def _median(times: list[float]) -> float:
    return float(torch.tensor(times, dtype=torch.float64).median())
