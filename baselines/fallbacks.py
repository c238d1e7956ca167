"""The calls that did not run on the operator they were meant to run on, and why: never silent, always counted."""

from __future__ import annotations

import torch


class Fallbacks:
    """Calls that ran something else: ``"operator: reason"`` to their number.

    A compiled function counts once, when it is traced: the verdict is then part of the compiled code.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    @torch.compiler.assume_constant_result
    def note(self, op: str, reason: str) -> None:
        """Count one call of `op` that it does not take."""
        key = f"{op}: {reason}"
        self.counts[key] = self.counts.get(key, 0) + 1
