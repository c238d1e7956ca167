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

GIB = 1 << 30


class Outcome(StrEnum):
    """How a trial ended."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Outcome:
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = "ok", "all steps finished with finite losses"
    OK_PRESSURE = "ok_pressure", "finished, but the allocator had to free its cache and retry: slower than it should be"
    OOM_DEVICE = "oom_device", "the allocator could not get device memory"
    OOM_DEVICE_LIB = "oom_device_lib", "a library ran out of device memory outside the allocator"
    OOM_HOST = "oom_host", "the host ran out of memory"
    KERNEL_RESOURCE = "kernel_resource", "a kernel needs more shared memory or registers than the device has"
    INDEX_OVERFLOW = "index_overflow", "a tensor or launch grid exceeded an index limit"
    LAUNCH_FAIL = "launch_fail", "a kernel could not be launched or accessed memory illegally"
    TIMEOUT = "timeout", "the wall limit passed while steps were still finishing"
    HANG = "hang", "the wall limit passed with no step finished since a long time"
    CRASH = "crash", "the process died from a signal or left without a record"
    NAN = "nan", "the loss was not finite"
    UNSUPPORTED = "unsupported", "the variant cannot run here; the detail says why"
    ERROR = "error", "the variant raised an exception of another kind"
    SKIPPED_DOMINATED = "skipped_dominated", "not run: shorter lengths already failed for the same reason"

    @property
    def is_ok(self) -> bool:
        """Whether the trial left a valid measurement."""
        return self in (Outcome.OK, Outcome.OK_PRESSURE)

    @property
    def is_memory(self) -> bool:
        """Whether the trial ended for want of memory, on the device or the host."""
        return self in (Outcome.OOM_DEVICE, Outcome.OOM_DEVICE_LIB, Outcome.OOM_HOST)
