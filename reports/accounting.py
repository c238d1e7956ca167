"""Where a device's memory went: what the driver's library saw, against what PyTorch knows of.

The library's reading (NVML, AMD SMI), sampled beside the trial, is one measurement; the allocator's reserved
peak is another; what lies outside the allocator (context, library workspaces) is read once, when the trial
has ended. What is left over is what nobody accounts for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megafold_bench.outcomes import Outcome
from megafold_bench.records import Record
from reports.cells import outcome_of, series_names
from reports.fields import group

ACCEPTABLE = 0.02


@dataclass(frozen=True)
class Account:
    """One memory trial. Bytes; `used_bytes` is everybody's use of the device at its peak."""

    series: str
    seq_len: int
    outcome: Outcome
    used_bytes: int
    reserved_bytes: int
    outside_bytes: int

    @property
    def remainder_bytes(self) -> int:
        """What neither the allocator nor the context explains; negative where a sample missed the peak."""
        return self.used_bytes - self.reserved_bytes - self.outside_bytes

    @property
    def remainder(self) -> float:
        """The remainder as a share of what was used."""
        return self.remainder_bytes / self.used_bytes


def accounts(records: Sequence[Record]) -> list[Account]:
    """One account for each trial that measured device memory with a sampler beside it, by series and length."""
    found = []
    for record, series in zip(records, series_names(records), strict=True):
        memory, telemetry = group(record, "memory"), group(record, "telemetry")
        used, reserved = telemetry.get("device_used_peak_bytes"), memory.get("reserved_peak_bytes")
        outside = memory.get("non_torch_bytes")
        if not used or reserved is None or outside is None:
            continue
        length = record["factors"]["seq_len_tokens"]
        found.append(Account(series, length, outcome_of(record), used, reserved, outside))
    return sorted(found, key=lambda account: (account.series, account.seq_len))


def verdict(found: Sequence[Account]) -> str:
    """In a sentence how much is left unexplained."""
    worst = max(found, key=lambda account: abs(account.remainder))
    size = f"{100 * abs(worst.remainder):.2f} % ({worst.series} at {worst.seq_len})"
    if abs(worst.remainder) <= ACCEPTABLE:
        return f"All of it is explained to within {100 * ACCEPTABLE:g} %: the largest remainder is {size}."
    return f"Not all of it is explained to within {100 * ACCEPTABLE:g} %: the largest remainder is {size}."
