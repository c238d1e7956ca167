"""Step times: synchronised steps, wall clock and device events side by side.

One step is ``step(transfer(load()))``, starting and ending with an idle device. Its wall time is
split into waiting for data, the transfer, and enqueueing; on a GPU, events on the stream time the
transfer and the step as the device saw them. Nothing is printed, collected or sent inside a step.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megafold_bench.outcomes import NonFiniteLossError
from megafold_bench.records import Record
from megafold_bench.variants import Workload

GC_POLICY = "frozen after build; automatic off; generation 1 between steps, outside the timed window"
SERIES = ("step_time_s", "gpu_step_time_s", "data_wait_s", "h2d_s", "enqueue_s")


class Timer(Protocol):
    """Marks moments on the device's own time line."""

    def synchronise(self) -> None:
        """Wait until the device is idle."""

    def mark(self) -> Any:
        """A moment in the device's queue."""

    def elapsed_s(self, start: Any, end: Any) -> float | None:
        """Seconds between two moments that have passed; None if the device has no clock of its own."""


class HostTimer:
    """For devices that run in step with the host: a CPU."""

    def synchronise(self) -> None:
        """Nothing to wait for."""

    def mark(self) -> None:
        """No moment."""

    def elapsed_s(self, start: None, end: None) -> None:
        """None: the wall clock is the only one."""


class CudaTimer:
    """CUDA or HIP events on the current stream."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def synchronise(self) -> None:
        """Wait for all streams of the device."""
        self._cuda.synchronize()

    def mark(self) -> Any:
        """An event recorded now."""
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_s(self, start: Any, end: Any) -> float:
        """Seconds between two events."""
        return float(start.elapsed_time(end)) / 1e3


def timer_for(device: str) -> Timer:
    """The timer of a device kind."""
    return CudaTimer() if device == "cuda" else HostTimer()


@dataclass
class StepLog:
    """Raw values of every step in order, the first one included."""

    series: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SERIES})
    losses: list[float] = field(default_factory=list)

    def add(self, values: dict[str, float | None], loss: float) -> None:
        """Append one step."""
        for name, value in values.items():
            if value is not None:
                self.series[name].append(value)
        self.losses.append(loss)


def timed_step(workload: Workload, timer: Timer) -> tuple[dict[str, float | None], float]:
    """Run one step. Returns its times in seconds and its loss."""
    began = time.perf_counter()
    batch = workload.load()
    loaded = time.perf_counter()
    before_transfer = timer.mark()
    on_device = workload.transfer(batch)
    before_step = timer.mark()
    transferred = time.perf_counter()
    result = workload.step(on_device)
    enqueued = time.perf_counter()
    after_step = timer.mark()
    timer.synchronise()
    ended = time.perf_counter()
    on_gpu = timer.elapsed_s(before_step, after_step)
    transfer_on_gpu = timer.elapsed_s(before_transfer, before_step)
    times = {
        "step_time_s": ended - began,
        "gpu_step_time_s": on_gpu,
        "data_wait_s": loaded - began,
        "h2d_s": transferred - loaded if transfer_on_gpu is None else transfer_on_gpu,
        "enqueue_s": None if on_gpu is None else enqueued - transferred,
    }
    return times, float(result["loss"])


class QuietCollector:
    """Garbage collection by `GC_POLICY` while steps are measured."""

    def __enter__(self) -> QuietCollector:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def between_steps(self) -> None:
        """Break the cycles the last step left, outside the timed window."""
        gc.collect(1)

    def __exit__(self, *_: object) -> None:
        gc.enable()
        gc.unfreeze()


def run_steps(
    workload: Workload, timer: Timer, count: int, log: StepLog, on_step: Callable[[int], None]
) -> None:
    """Run `count` steps into `log`; `on_step(index)` is called after each, outside the timed window.

    Raises `NonFiniteLossError` at the first loss that is not finite; the log holds it.
    """
    timer.synchronise()
    with QuietCollector() as collector:
        for index in range(count):
            times, loss = timed_step(workload, timer)
            log.add(times, loss)
            on_step(index)
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the loss of step {index} is {loss}")
            collector.between_steps()


def add_time(record: Record, log: StepLog, build_s: float) -> None:
    """Put the raw samples into a time-phase record; `megafold_bench.finish` completes it."""
    aside = record["factors"]["warmup_steps"]
    record["time"] = {  # type: ignore[typeddict-item]
        "samples": {name: values[aside:] for name, values in log.series.items() if values},
        "warmup_samples": {name: values[:aside] for name, values in log.series.items() if values},
        "warmup_steps": aside,
        "build_s": build_s,
    }
