"""Whether anybody else used a device during a trial.

The sampler notes which processes that are not of its own session hold memory on the device: first before
the trial has touched it, then every second. In a container the library gives the host's process ids, which
match nobody here: then one newcomer is taken to be the trial itself. A process that shows only once was on
its way out, or came and went within a second, and is not counted.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megafold_bench.devices.base import DeviceProcess, Unavailable

SEEN_AT_LEAST = 2
IDLE_LIMIT_BYTES = 1 << 30
"""More than this in use before the trial has touched the device is somebody's, whatever the list says:
drivers keep some hundred MiB at most, and a container may show an empty list."""


@dataclass(frozen=True)
class Company:
    """One look at the device: whether a process of our session holds it, and which others do."""

    ours: bool
    others: tuple[int, ...]


def is_ours(pid: int) -> bool:
    """Whether a process is of this session: the trial, its guard, its sampler, what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid) == os.getsid(0)
    return False


def look(processes: Iterable[DeviceProcess]) -> Company:
    """Sort the processes on a device. One that holds no memory is a monitor, not a user."""
    pids = [process.pid for process in processes if process.used_bytes != 0]
    others = tuple(sorted(pid for pid in pids if not is_ours(pid)))
    return Company(len(others) < len(pids), others)


def foreign_processes(looks: Sequence[Company]) -> int | Unavailable:
    """How many processes other than the trial's held the device, from looks of which the first came before it."""
    if not looks:
        return Unavailable("processes: no sample of them")
    seen = Counter(pid for company in looks for pid in company.others)
    staying = {pid for pid, times in seen.items() if times >= SEEN_AT_LEAST}
    newcomers = staying - set(looks[0].others)
    # Our own process is among the newcomers where its id is not ours to see.
    ourselves = 1 if newcomers and not any(company.ours for company in looks) else 0
    return len(staying) - ourselves


def found_company(foreign: int | None, device: str, baseline_bytes: int | None) -> bool:
    """Whether a record's numbers were taken in company. `baseline_bytes` was in use before the trial began."""
    occupied = device != "cpu" and baseline_bytes is not None and baseline_bytes > IDLE_LIMIT_BYTES
    return bool(foreign) or occupied
