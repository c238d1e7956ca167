"""Triangle multiplication (Alg 12, 13) and triangle attention (Alg 14, 15) on the pair representation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.af3.attention import AttentionFunction, biased_attention, key_mask_bias
from baselines.af3.config import Attention, BiasOrientation
from baselines.af3.primitives import LayerNorm, Linear


class TriangleMultiplication(nn.Module):
    """Update of edge ij from the two other edges of every triangle (Alg 12 outgoing, Alg 13 incoming).

    Outgoing: Σ_k a_ik b_jk. Incoming: Σ_k a_ki b_kj.
    """

    def __init__(self, c_z: int, c_hidden: int, *, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.layer_norm_in = LayerNorm(c_z)
        self.linear_a_p = Linear(c_z, c_hidden)
        self.linear_a_g = Linear(c_z, c_hidden, init="zero")
        self.linear_b_p = Linear(c_z, c_hidden)
        self.linear_b_g = Linear(c_z, c_hidden, init="zero")
        self.layer_norm_out = LayerNorm(c_hidden)
        self.linear_z = Linear(c_hidden, c_z, init="zero")
        self.linear_g = Linear(c_z, c_z, init="zero")

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The update of z [N, N, c_z], without the residual. `mask` [N]: tokens to keep."""
        z = self.layer_norm_in(z)
        a = torch.sigmoid(self.linear_a_g(z)) * self.linear_a_p(z)
        b = torch.sigmoid(self.linear_b_g(z)) * self.linear_b_p(z)
        if mask is not None:
            pair_mask = (mask[:, None] & mask[None, :]).unsqueeze(-1)
            a, b = a * pair_mask, b * pair_mask
        product = torch.einsum("ikc,jkc->ijc" if self.outgoing else "kic,kjc->ijc", a, b)
        return self.linear_z(self.layer_norm_out(product)) * torch.sigmoid(self.linear_g(z))


class TriangleAttention(nn.Module):
    """Gated self-attention along the rows (Alg 14, starting node) or columns (Alg 15, ending node) of z.

    The logits of edges ij and ik (starting) or ij and kj (ending) are biased by the third edge. For the
    ending node `bias_orientation` says which of its two directions: see `PairConfig.ending_node_bias`.
    """

    def __init__(
        self,
        c_z: int,
        heads: int,
        width: int,
        *,
        starting: bool,
        bias_orientation: BiasOrientation = "ik",
        attention: Attention = "sdpa",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.starting = starting
        self.bias_orientation = bias_orientation
        self.attention: Attention | AttentionFunction = attention
        self.layer_norm = LayerNorm(c_z)
        self.linear_bias = Linear(c_z, heads)
        self.linear_q = Linear(c_z, heads * width)
        self.linear_k = Linear(c_z, heads * width)
        self.linear_v = Linear(c_z, heads * width)
        self.linear_g = Linear(c_z, heads * width, init="zero")
        self.linear_o = Linear(heads * width, c_z, init="zero")

    def _split(self, x: Tensor) -> Tensor:
        """[rows, N, heads·width] to [rows, heads, N, width], without a copy."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The update of z [N, N, c_z], without the residual. `mask` [N]: tokens to keep as keys."""
        z = self.layer_norm(z)
        bias = self.linear_bias(z).permute(2, 0, 1)
        if not self.starting:
            z = z.transpose(0, 1)
            if self.bias_orientation == "ki":
                bias = bias.transpose(1, 2)
        if mask is not None:
            bias = bias + key_mask_bias(mask, bias.dtype)
        q, k, v = self._split(self.linear_q(z)), self._split(self.linear_k(z)), self._split(self.linear_v(z))
        x = biased_attention(q, k, v, bias, self.attention).transpose(1, 2).flatten(-2)
        x = self.linear_o(x * torch.sigmoid(self.linear_g(z)))
        return x if self.starting else x.transpose(0, 1)
