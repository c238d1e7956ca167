"""Token attention with pair bias (Alg 24), plain for the trunk and conditioned for diffusion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.af3.attention import AttentionFunction, biased_attention, key_mask_bias
from baselines.af3.config import Attention
from baselines.af3.primitives import AdaptiveLayerNorm, LayerNorm, Linear


class PairBias(nn.Module):
    """Attention biases from a pair representation: LayerNorm and projection to one channel per head."""

    def __init__(self, c_z: int, heads: int, *, offset: bool) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(c_z, offset=offset)
        self.linear = Linear(c_z, heads)

    def forward(self, z: Tensor) -> Tensor:
        """[heads, ..., N] from z [..., N, c_z]."""
        return self.linear(self.layer_norm(z)).movedim(-1, 0)


class AttentionPairBias(nn.Module):
    """Gated multi-head self-attention over tokens with a given pair bias (Alg 24).

    With `c_s`, the input is normalised adaptively and the output gated by the conditioning `s`;
    without, plain LayerNorm and a zero-initialised output projection (the trunk's single attention).
    """

    def __init__(
        self, c_a: int, heads: int, *, c_s: int | None = None, attention: Attention = "sdpa"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention: Attention | AttentionFunction = attention
        self.layer_norm = LayerNorm(c_a) if c_s is None else None
        self.ada_ln = None if c_s is None else AdaptiveLayerNorm(c_a, c_s)
        self.linear_q = Linear(c_a, c_a, bias=True)
        self.linear_k = Linear(c_a, c_a)
        self.linear_v = Linear(c_a, c_a)
        self.linear_g = Linear(c_a, c_a, init="zero")
        self.linear_o = Linear(c_a, c_a, init="zero" if c_s is None else "lecun")
        self.linear_s = None if c_s is None else Linear(c_s, c_a, bias=True, init="adaptive_gate")

    def _normalise(self, a: Tensor, s: Tensor | None) -> Tensor:
        if self.layer_norm is not None:
            return self.layer_norm(a)
        if self.ada_ln is None or s is None:
            raise ValueError("conditioned attention needs the conditioning s")
        return self.ada_ln(a, s)

    def _split(self, x: Tensor) -> Tensor:
        """[D, N, c] to [D, heads, N, c / heads], without a copy."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, a: Tensor, bias: Tensor, s: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The update of a, without the residual.

        a [N, c_a] or [D, N, c_a] with D samples; bias [heads, N, N], shared by the samples; s as a, with
        c_s channels; mask [N] tokens to keep as keys.
        """
        a = self._normalise(a, s)
        if mask is not None:
            bias = bias + key_mask_bias(mask, bias.dtype)
        samples = a if a.ndim == 3 else a.unsqueeze(0)
        q = self._split(self.linear_q(samples))
        k = self._split(self.linear_k(samples))
        v = self._split(self.linear_v(samples))
        x = biased_attention(q, k, v, bias, self.attention).transpose(1, 2).flatten(-2).view(a.shape)
        x = self.linear_o(x * torch.sigmoid(self.linear_g(a)))
        if self.linear_s is not None and s is not None:
            x = x * torch.sigmoid(self.linear_s(s))
        return x
