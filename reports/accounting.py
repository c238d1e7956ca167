"""Where a device's memory went: what the driver's library saw, against what PyTorch knows of.

The library's reading (NVML, AMD SMI), sampled beside the trial, is one measurement; the allocator's reserved
peak is another; what lies outside the allocator (context, library workspaces) is read once, when the trial
has ended. What is left over is what nobody accounts for.

A request that is refused leaves a trace too. With expandable segments the allocator has its pieces mapped one after
another until the driver has no more, and gives them back: the library may see them, the allocator never counts them.
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
    tried_bytes: int = 0
    """The request that was refused, where the trial ran out of memory."""

    @property
    def refused_bytes(self) -> int:
        """As much of the refused request as may have been mapped when the library looked."""
        return min(self.tried_bytes, max(self.used_bytes - self.reserved_bytes - self.outside_bytes, 0))

    @property
    def remainder_bytes(self) -> int:
        """What nothing of this explains; negative where a sample missed the peak."""
        return self.used_bytes - self.reserved_bytes - self.outside_bytes - self.refused_bytes

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
        outcome = outcome_of(record)
        oom = record["outcome"].get("oom") if outcome is Outcome.OOM_DEVICE else None
        tried = (oom["tried_bytes"] or 0) if oom else 0
        found.append(Account(series, length, outcome, used, reserved, outside, tried))
    return sorted(found, key=lambda account: (account.series, account.seq_len))


def verdict(found: Sequence[Account]) -> str:
    """In sentences how much is left unexplained, and where the device's library saw too little to say."""
    missed = [account for account in found if account.remainder < -ACCEPTABLE]
    refused = [account for account in found if account.refused_bytes > ACCEPTABLE * account.used_bytes]
    judged = [account for account in found if account not in missed]
    sentences = []
    if judged:
        worst = max(judged, key=lambda account: abs(account.remainder))
        start = "All" if abs(worst.remainder) <= ACCEPTABLE else "Not all"
        sentences.append(
            f"{start} of it is explained to within {100 * ACCEPTABLE:g} %: the largest remainder is {_share(worst)}."
        )
    if refused:
        most = max(refused, key=lambda account: account.refused_bytes / account.used_bytes)
        sentences.append(
            f"In {len(refused)} of {len(found)} trials part of this is the request that was refused, pieces of which were "
            f"mapped as the library looked: up to {100 * most.refused_bytes / most.used_bytes:.1f} % "
            f"({most.series} at {most.seq_len})."
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
