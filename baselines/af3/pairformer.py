"""The pair block and the Pairformer (Alg 17)."""

from __future__ import annotations

from torch import Tensor, nn

from baselines.af3.attention_pair_bias import AttentionPairBias, PairBias
from baselines.af3.config import Attention, PairConfig, PairformerConfig
from baselines.af3.primitives import SharedDropout, Transition
from baselines.af3.triangle import TriangleAttention, TriangleMultiplication


class PairBlock(nn.Module):
    """Triangle multiplications, triangle attentions and transition on z, each with its residual.

    The pair half of a Pairformer block; the MSA module and the template embedder use it alone.
    """

    def __init__(self, c_z: int, config: PairConfig, attention: Attention) -> None:
        super().__init__()
        self.tri_mul_out = TriangleMultiplication(c_z, config.triangle_hidden, outgoing=True)
        self.tri_mul_in = TriangleMultiplication(c_z, config.triangle_hidden, outgoing=False)
        heads, width = config.attention_heads, config.attention_width
        self.tri_att_start = TriangleAttention(c_z, heads, width, starting=True, attention=attention)
        self.tri_att_end = TriangleAttention(
            c_z,
            heads,
            width,
            starting=False,
            bias_orientation=config.ending_node_bias,
            attention=attention,
        )
        self.pair_transition = Transition(c_z, config.transition_n)
        self.row_dropout = SharedDropout(config.dropout, shared=-3)
        self.column_dropout = SharedDropout(config.dropout, shared=-2)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The new z [N, N, c_z]. `mask` [N]: tokens to keep."""
        z = z + self.row_dropout(self.tri_mul_out(z, mask))
        z = z + self.row_dropout(self.tri_mul_in(z, mask))
        z = z + self.row_dropout(self.tri_att_start(z, mask))
        z = z + self.column_dropout(self.tri_att_end(z, mask))
        return z + self.pair_transition(z)


class PairformerBlock(nn.Module):
    """A pair block, then attention with pair bias and transition on the single representation."""

    def __init__(self, c_s: int, c_z: int, config: PairformerConfig, attention: Attention) -> None:
        super().__init__()
        self.pair = PairBlock(c_z, config.pair, attention)
        self.pair_bias = PairBias(c_z, config.single_heads, offset=True)
        self.attention_pair_bias = AttentionPairBias(c_s, config.single_heads, attention=attention)
        self.single_transition = Transition(c_s, config.single_transition_n)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The new s [N, c_s] and z [N, N, c_z]. `mask` [N]: tokens to keep."""
        z = self.pair(z, mask)
        s = s + self.attention_pair_bias(s, self.pair_bias(z), mask=mask)
        s = s + self.single_transition(s)
        return s, z


class Pairformer(nn.Module):
    """A stack of Pairformer blocks."""

    def __init__(self, c_s: int, c_z: int, config: PairformerConfig, attention: Attention) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PairformerBlock(c_s, c_z, config, attention) for _ in range(config.blocks)
        )

    def forward(self, s: Tensor, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The new s [N, c_s] and z [N, N, c_z]."""
        for block in self.blocks:
            s, z = block(s, z, mask)
        return s, z
