"""The memory boundary of each series, as far as a run's trials show it, whatever they were run for.

The ends are those of `megafold_bench.boundary`: the longest success below every failure and the
shortest failure above every success.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reports.cells import NOT_RUN, Cell, by_series


@dataclass(frozen=True)
class Boundary:
    """Longest length that fits, shortest that does not (None where no trial showed one).

    `other_end` names an ending for another cause than memory below which nothing more is known;
    `monotone` is False where a longer length passed than one that failed.
    """

    series: str
    max_ok: int | None
    min_fail: int | None
    other_end: str
    n_trials: int
    monotone: bool
    capacity_bytes: int | None

    @property
    def granularity(self) -> int | None:
        """Distance between the two ends: how well the boundary is known."""
        return self.min_fail - self.max_ok if self.max_ok is not None and self.min_fail is not None else None

    def text(self) -> str:
        """In words: ``"640 fits, 768 does not"``."""
        if self.max_ok is None and self.min_fail is None:
            return "no length fitted" + (f" ({self.other_end})" if self.other_end else "")
        if self.min_fail is None:
            return f"{self.max_ok} fits, no failure for want of memory seen"
        if self.max_ok is None:
            return f"not even {self.min_fail} fits"
        return f"{self.max_ok} fits, {self.min_fail} does not"


def boundaries(found: Iterable[Cell]) -> list[Boundary]:
    """The boundary of each series."""
    result = []
    for series, group in by_series(found).items():
        passed = [cell.seq_len for cell in group if cell.outcome.is_ok]
        failed = [cell.seq_len for cell in group if cell.outcome.is_memory]
        others = [cell for cell in group if not (cell.outcome.is_ok or cell.outcome.is_memory)]
        other = next((c for c in others if c.outcome not in NOT_RUN), others[0] if others else None)
        result.append(
            Boundary(
                series=series,
                max_ok=max((n for n in passed if not failed or n < min(failed)), default=None),
                min_fail=min((n for n in failed if not passed or n > max(passed)), default=None),
                other_end=f"{other.outcome.value} at {other.seq_len}" if other else "",
                n_trials=sum(len(cell.statuses) for cell in group),
                monotone=not (passed and failed) or max(passed) < min(failed),
                capacity_bytes=max((c.capacity_bytes for c in group if c.capacity_bytes), default=None),
            )
        )
    return result
