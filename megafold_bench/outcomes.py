"""How a trial can end, and how an ending is recognised.

The worker classifies the exception it caught (`classify`); the parent completes what the worker could
not see: a signal, an exit code, a kill by the kernel's out-of-memory killer, the wall limit
(`complete`). Exception classes are compared by name along their class hierarchy, so that this module
needs neither torch nor Triton.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """How a trial ended. `meaning` says it in a line."""

    OK = "ok"
    OK_PRESSURE = "ok_pressure"
    OOM_DEVICE = "oom_device"
    OOM_DEVICE_LIB = "oom_device_lib"
    OOM_HOST = "oom_host"
    KERNEL_RESOURCE = "kernel_resource"
    INDEX_OVERFLOW = "index_overflow"
    LAUNCH_FAIL = "launch_fail"
    TIMEOUT = "timeout"
    HANG = "hang"
    CRASH = "crash"
    NAN = "nan"
    UNSUPPORTED = "unsupported"
    ERROR = "error"
    SKIPPED_DOMINATED = "skipped_dominated"

    @property
    def meaning(self) -> str:
        """What the outcome says, in a line."""
        return _MEANINGS[self]

    @property
    def is_ok(self) -> bool:
        """Whether the trial left a valid measurement."""
        return self in (Outcome.OK, Outcome.OK_PRESSURE)

    @property
    def is_memory(self) -> bool:
        """Whether the trial ended for want of memory, on the device or the host."""
        return self in (Outcome.OOM_DEVICE, Outcome.OOM_DEVICE_LIB, Outcome.OOM_HOST)


_MEANINGS = {
    Outcome.OK: "all steps finished with finite losses",
    Outcome.OK_PRESSURE: "finished, but the allocator had to free its cache and retry: slower than it should be",
    Outcome.OOM_DEVICE: "the allocator could not get device memory",
    Outcome.OOM_DEVICE_LIB: "a library ran out of device memory outside the allocator",
    Outcome.OOM_HOST: "the host ran out of memory",
    Outcome.KERNEL_RESOURCE: "a kernel needs more shared memory or registers than the device has",
    Outcome.INDEX_OVERFLOW: "a tensor or launch grid exceeded an index limit",
    Outcome.LAUNCH_FAIL: "a kernel could not be launched or accessed memory illegally",
    Outcome.TIMEOUT: "the wall limit passed while steps were still finishing",
    Outcome.HANG: "the wall limit passed with no step finished since a long time",
    Outcome.CRASH: "the process died from a signal or left without a record",
    Outcome.NAN: "the loss was not finite",
    Outcome.UNSUPPORTED: "the variant cannot run here; the detail says why",
    Outcome.ERROR: "the variant raised an exception of another kind",
    Outcome.SKIPPED_DOMINATED: "not run: shorter lengths already failed for the same reason",
}


@dataclass(frozen=True)
class Verdict:
    """An outcome with the evidence for it."""

    outcome: Outcome
    detail: str = ""
    exception_type: str | None = None
    oom: dict[str, int | None] | None = None


HOST_MEMORY_TEXT = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)|std::bad_alloc|^MemoryError"
    r"|Cannot allocate memory|CUDA_ERROR_OUT_OF_HOST_MEMORY|[Hh]ost memory allocation failed",
    re.MULTILINE,
)
KERNEL_RESOURCE_TEXT = re.compile(
    r"out of resource|too many resources requested for launch|exceeds? (the )?(available )?shared memory"
    r"|uses too much shared data|register allocation failed",
    re.IGNORECASE,
)
INDEX_TEXT = re.compile(
    r"invalid configuration argument|32-bit index|canUse32BitIndexMath|larger than 2\^31|INT_MAX"
    r"|integer out of range|nonzero is not supported for tensors with more than",
    re.IGNORECASE,
)
DEVICE_LIB_MEMORY_TEXT = re.compile(
    r"CUBLAS_STATUS_ALLOC_FAILED|HIPBLAS_STATUS_ALLOC_FAILED|rocblas_status_memory_error"
    r"|CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED|miopenStatusAllocFailed"
    r"|Failed to (CUDA|cuda|HIP|hip) (calloc|malloc)|(cuda|hip)ErrorMemoryAllocation"
    r"|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory|out of memory",
    re.IGNORECASE,
)
LAUNCH_TEXT = re.compile(
    r"illegal memory access|illegal address|misaligned address|illegal instruction|launch failure"
    r"|launch failed|device-side assert|invalid device function|no kernel image|memory access fault"
    r"|launch timed out",
    re.IGNORECASE,
)
_TEXTS = (
    # "CUDA error: out of resources" must not be read as "out of memory", so kernels come before libraries.
    (HOST_MEMORY_TEXT, Outcome.OOM_HOST),
    (KERNEL_RESOURCE_TEXT, Outcome.KERNEL_RESOURCE),
    (INDEX_TEXT, Outcome.INDEX_OVERFLOW),
    (DEVICE_LIB_MEMORY_TEXT, Outcome.OOM_DEVICE_LIB),
    (LAUNCH_TEXT, Outcome.LAUNCH_FAIL),
)
_CLASSES = {
    "OutOfMemoryError": Outcome.OOM_DEVICE,
    "MemoryError": Outcome.OOM_HOST,
    "OutOfResources": Outcome.KERNEL_RESOURCE,
    "UnsupportedError": Outcome.UNSUPPORTED,
    "NonFiniteLossError": Outcome.NAN,
}
_TEXT_CLASSES = {"RuntimeError", "AcceleratorError", "DistBackendError", "OSError", "ValueError", "HIPError"}

_SIZE = r"(\d+(?:\.\d+)?) ?(bytes|KiB|MiB|GiB|TiB)"
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_OOM_FIELDS = {
    "tried_bytes": re.compile(r"[Tt]ried to allocate " + _SIZE),
    "free_bytes": re.compile(_SIZE + r" is free"),
    "allocated_bytes": re.compile(_SIZE + r" (?:is )?allocated by PyTorch"),
    "reserved_unallocated_bytes": re.compile(_SIZE + r" is reserved by PyTorch but unallocated"),
}


class UnsupportedError(RuntimeError):
    """The variant cannot run on this machine; raised by the worker with the variant's own reason."""


class NonFiniteLossError(ArithmeticError):
    """A step's loss was NaN or infinite."""


def parse_oom(message: str) -> dict[str, int | None]:
    """The byte counts in PyTorch's out-of-memory message; None for those it does not give."""
    found: dict[str, int | None] = {}
    for name, pattern in _OOM_FIELDS.items():
        match = pattern.search(message)
        found[name] = round(float(match[1]) * _UNITS[match[2]]) if match else None
    return found


def classify(error: BaseException) -> Verdict:
    """The outcome that an exception caught in the worker stands for.

    The class decides first, along its method resolution order (PyTorch's `OutOfMemoryError` is a
    `RuntimeError`); then the message of run-time errors; anything else is `ERROR`.
    """
    message = str(error)
    kind = type(error)
    qualified = f"{kind.__module__}.{kind.__qualname__}"
    detail = message.strip().splitlines()[0][:500] if message.strip() else kind.__qualname__
    for base in kind.__mro__:
        outcome = _CLASSES.get(base.__name__)
        if outcome is not None:
            oom = parse_oom(message) if outcome is Outcome.OOM_DEVICE else None
            return Verdict(outcome, detail, qualified, oom)
    if any(base.__name__ in _TEXT_CLASSES for base in kind.__mro__):
        for pattern, outcome in _TEXTS:
            if pattern.search(message):
                oom = parse_oom(message) if outcome is Outcome.OOM_DEVICE_LIB else None
                return Verdict(outcome, detail, qualified, oom)
    if error.__cause__ is not None:
        inner = classify(error.__cause__)
        if inner.outcome is not Outcome.ERROR:
            return Verdict(inner.outcome, f"{detail} (from {inner.detail})"[:500], qualified, inner.oom)
    return Verdict(Outcome.ERROR, f"{kind.__qualname__}: {detail}"[:500], qualified)


@dataclass(frozen=True)
class Ending:
    """What the parent saw of a trial that left no record of its own."""

    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    oom_kills: int = 0
    """Kills by the kernel's out-of-memory killer in our cgroup while the trial ran."""
    log_tail: str = ""
    last_event: str = "started"
    silence_s: float = 0.0
    """Seconds between the last sign of progress and the end."""
    step_gaps_s: tuple[float, ...] = field(default=())
    """Seconds between successive signs of progress, up to the last finished step."""
    limit_s: float = 0.0


HANG_FACTOR = 10.0
"""A trial hangs when it has been silent for this many times its longest step."""


def complete(ending: Ending) -> Verdict:
    """The outcome of a trial whose worker left no record, from what the parent saw."""
    if ending.timed_out:
        return _timed_out(ending)
    if ending.signal is not None:
        name = signal_name(ending.signal)
        if ending.oom_kills and ending.signal == signal.SIGKILL:
            return Verdict(Outcome.OOM_HOST, f"killed by the kernel's out-of-memory killer ({name})")
        if ending.signal == signal.SIGABRT and HOST_MEMORY_TEXT.search(ending.log_tail):
            return Verdict(Outcome.OOM_HOST, f"aborted for want of host memory ({name})")
        return Verdict(Outcome.CRASH, f"died from {name} after event {ending.last_event!r}")
    if ending.exit_code == 128 + signal.SIGKILL and ending.oom_kills:
        return Verdict(Outcome.OOM_HOST, "killed by the kernel's out-of-memory killer (exit code 137)")
    if HOST_MEMORY_TEXT.search(ending.log_tail):
        return Verdict(Outcome.OOM_HOST, f"left with exit code {ending.exit_code} for want of host memory")
    return Verdict(
        Outcome.CRASH, f"left no record, exit code {ending.exit_code}, after event {ending.last_event!r}"
    )


def _timed_out(ending: Ending) -> Verdict:
    where = f"after {ending.limit_s:g} s; last event {ending.last_event!r} {ending.silence_s:.1f} s earlier"
    if ending.step_gaps_s and ending.silence_s > HANG_FACTOR * max(ending.step_gaps_s):
        return Verdict(Outcome.HANG, f"stopped {where}, longest step {max(ending.step_gaps_s):.3g} s")
    return Verdict(Outcome.TIMEOUT, f"stopped {where}")


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9, ``signal 40`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
