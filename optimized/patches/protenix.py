"""Protenix 2.0: its modules on fused operators.

Unbatched, except for the samples of the diffusion module. Masks are floats, 1 = keep. The ending node gets a
contiguous transposed z and, like the starting node, the bias in that order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized import forwards
from optimized.forwards import TransitionWeights, keep
from optimized.ops.triangle_attention import Orientation, TriangleAttentionWeights
from optimized.patches import openfold3
from optimized.patches.openfold3 import check_attention, check_multiplication
from optimized.recipes import Fused, Recipe, affine, first, head_size, width, without_bias


class TriangleMultiplication(openfold3.TriangleMultiplication):
    """Triangle multiplication."""

    def forward(  # type: ignore[override]
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
        triangle_multiplicative: str = "torch",
    ) -> Tensor:
        """The update of z [*, N, N, c], or z itself with the update added where the caller asks for that."""
        return self._update(z, mask, inplace_safe and _add_with_inplace)


class TriangleAttention(Fused):
    """Triangle attention."""

    starting: bool
    no_heads: int
    layer_norm: Any
    linear: Any
    mha: Any

    def forward(self, x: Tensor, mask: Tensor | None = None, *unused: Any, **options: Any) -> Tensor:
        """The update of x [*, N, N, c], without the residual; mask [*, N, N]."""
        mha = self.mha
        weights = TriangleAttentionWeights(
            self.layer_norm.weight, self.layer_norm.bias, mha.linear_q.weight, mha.linear_k.weight,
            mha.linear_v.weight, mha.linear_g.weight, self.linear.weight, mha.linear_o.weight,
        )  # fmt: skip
        way = Orientation(columns=not self.starting, flipped=not self.starting)
        eps, out_bias = self.layer_norm.eps, mha.linear_o.bias
        return forwards.triangle_attention(
            x, weights, self.no_heads, way, keep(mask), eps, self.fallbacks, out_bias
        )


class Transition(Fused):
    """Transition."""

    layernorm1: Any
    linear_no_bias_a: Any
    linear_no_bias_b: Any
    linear_no_bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """The update of x [..., c], without the residual."""
        norm = self.layernorm1
        weights = TransitionWeights(
            norm.weight, norm.bias, self.linear_no_bias_a.weight, self.linear_no_bias_b.weight,
            self.linear_no_bias.weight,
        )  # fmt: skip
        return forwards.transition(x, weights, norm.eps, self.fallbacks)


class AttentionPairBias(Fused):
    """Attention with pair bias, of the single track and of the token transformer."""

    attention: Any
    layernorm_z: Any
    linear_nobias_z: Any

    def standard_multihead_attention(
        self,
        q: Tensor,
        kv: Tensor,
        z: Tensor,
        inplace_safe: bool = False,
        enable_efficient_fusion: bool = False,
    ) -> Tensor:
        """The attention over all tokens; that over windows, and what is around both, stays the library's.

        q, kv [*, N, c] normalised; z [*', N, N, c_z], or [*', c_z, N, N] normalised with efficient fusion.
        """
        attention = self.attention
        queries, keys, values = (
            linear(x).unflatten(-1, (attention.num_heads, -1))
            for linear, x in ((attention.linear_q, q), (attention.linear_k, kv), (attention.linear_v, kv))
        )
        bias = self._bias(z, enable_efficient_fusion)
        o = forwards.shared_bias_attention(queries, keys, values, bias, None, self.fallbacks, self.products)
        return attention.linear_o(o * torch.sigmoid(attention.linear_g(q)))

    def _bias(self, z: Tensor, channels_first: bool) -> Tensor:
        """[*', H, N, N]."""
        norm, linear = self.layernorm_z, self.linear_nobias_z
        if channels_first:
            return torch.nn.functional.conv2d(z, (linear.weight * norm.weight)[:, :, None, None])
        return forwards.pair_bias(z, norm, linear, self.fused_ops, self.fallbacks)[0].movedim(0, -3)


def _check_transition(m: Any) -> str:
    linears = (m.linear_no_bias_a, m.linear_no_bias_b, m.linear_no_bias)
    return first(affine(m.layernorm1), without_bias(linears), width("transition", m.c_in))


def _check_pair_bias(m: Any) -> str:
    if m.attention.linear_g is None:
        return "attention without a gate"
    if m.cross_attention_mode:
        return "windowed attention, for which there is no fused operator"
    return head_size(m.attention.linear_q.out_features, m.n_heads)


_MODEL = "protenix.model."
RECIPES = {
    f"{_MODEL}triangular.triangular.TriangleMultiplicativeUpdate": Recipe(
        "triangle_multiplication", TriangleMultiplication, check_multiplication
    ),
    f"{_MODEL}triangular.triangular.TriangleAttention": Recipe(
        "triangle_attention", TriangleAttention, lambda m: check_attention(m, m.linear)
    ),
    f"{_MODEL}modules.primitives.Transition": Recipe("transition", Transition, _check_transition),
    f"{_MODEL}modules.transformer.AttentionPairBias": Recipe(
        "attention_pair_bias", AttentionPairBias, _check_pair_bias
    ),
}
WITHOUT_OPERATOR = {
    f"{_MODEL}triangular.layers.OuterProductMean": "outer product mean",
    f"{_MODEL}modules.pairformer.MSAPairWeightedAveraging": "pair-weighted averaging",
    f"{_MODEL}modules.transformer.ConditionedTransitionBlock": "conditioned transition",
}
