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
    """In sentences how much is left unexplained, and where the device's library saw too little to say."""
    missed = [account for account in found if account.remainder < -ACCEPTABLE]
    judged = [account for account in found if account not in missed]
    sentences = []
    if judged:
        worst = max(judged, key=lambda account: abs(account.remainder))
        start = "All" if abs(worst.remainder) <= ACCEPTABLE else "Not all"
        sentences.append(
            f"{start} of it is explained to within {100 * ACCEPTABLE:g} %: the largest remainder is {_share(worst)}."
        )
    if missed:
        least = min(missed, key=lambda account: account.remainder)
        sentences.append(
            f"In {len(missed)} of {len(found)} trials the library's samples missed the allocator's peak, which was "
            f"shorter than the time between them: by {_share(least)} at most."
        )
    return " ".join(sentences)


def _share(account: Account) -> str:
    return f"{100 * abs(account.remainder):.2f} % ({account.series} at {account.seq_len}, {account.outcome.value})"
