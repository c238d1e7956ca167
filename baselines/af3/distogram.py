"""Distogram head."""

from __future__ import annotations

from torch import Tensor, nn

from baselines.af3.primitives import Linear, to_module_dtype

FIRST_BREAK, LAST_BREAK = 2.3125, 21.6875
"""First and last of the edges between distance bins, in Å; there is one edge fewer than bins."""


class DistogramHead(nn.Module):
    """Distance distribution of token pairs from the pair representation."""

    def __init__(self, c_z: int, bins: int) -> None:
        super().__init__()
        self.linear = Linear(c_z, bins, init="zero")

    def forward(self, z: Tensor) -> Tensor:
        """Symmetric logits [N, N, bins] from z [N, N, c_z]."""
        half = self.linear(to_module_dtype(z, self.linear.weight))
        return half + half.transpose(0, 1)
