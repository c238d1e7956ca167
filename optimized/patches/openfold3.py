"""OpenFold3 0.5: its modules on fused operators.

Any leading axes. Masks are floats, 1 = keep. The ending node gets a transposed z, and the bias in the order
before transposition (`transpose_bias`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized import forwards
from optimized.forwards import TransitionWeights, keep
from optimized.ops.triangle_attention import Orientation, TriangleAttentionWeights
from optimized.ops.triangle_multiplication import TriangleWeights
from optimized.recipes import Fused, Recipe, affine, first, head_size, width, without_bias


class TriangleMultiplication(Fused):
    """Triangle multiplication. OpenFold3 and Protenix name its parts alike."""

    _outgoing: bool
    layer_norm_in: Any
    layer_norm_out: Any
    linear_a_p: Any
    linear_a_g: Any
    linear_b_p: Any
    linear_b_g: Any
    linear_z: Any
    linear_g: Any

    def _update(self, z: Tensor, mask: Tensor | None, add: bool) -> Tensor:
        weights = TriangleWeights(
            self.layer_norm_in.weight, self.layer_norm_in.bias,
            self.linear_a_p.weight, self.linear_a_g.weight, self.linear_b_p.weight, self.linear_b_g.weight,
            self.layer_norm_out.weight, self.layer_norm_out.bias, self.linear_z.weight, self.linear_g.weight,
        )  # fmt: skip
        update = forwards.triangle_multiplication(
            z, weights, self._outgoing, keep(mask), self.layer_norm_in.eps, self.fallbacks
        )
        return z.add_(update) if add else update

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        use_cueq_triangle_kernels: bool = False,
        use_triton_triangle_kernels: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
    ) -> Tensor:
        """The update of z [*, N, N, c], or z itself with the update added where the caller asks for that."""
        return self._update(z, mask, inplace_safe and _add_with_inplace)


class TriangleAttention(Fused):
    """Triangle attention."""

    starting: bool
    no_heads: int
    layer_norm: Any
    linear_z: Any
    mha: Any

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        transpose_bias: bool = False,
        *unused: Any,
        **options: Any,
    ) -> Tensor:
        """The update of x [*, N, N, c], without the residual; mask [*, N, N]."""
        mha = self.mha
        weights = TriangleAttentionWeights(
            self.layer_norm.weight, self.layer_norm.bias, mha.linear_q.weight, mha.linear_k.weight,
            mha.linear_v.weight, mha.linear_g.weight, self.linear_z.weight, mha.linear_o.weight,
        )  # fmt: skip
        way = Orientation(not self.starting, flipped=self.starting == transpose_bias)
        eps, out_bias = self.layer_norm.eps, mha.linear_o.bias
        return forwards.triangle_attention(
            x, weights, self.no_heads, way, keep(mask), eps, self.fallbacks, out_bias
        )


class Transition(Fused):
    """Transition; what its own `forward` does about chunks and checkpoints stays."""

    layer_norm: Any
    swiglu: Any
    linear_out: Any

    def _transition(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = TransitionWeights(
            self.layer_norm.weight, self.layer_norm.bias, self.swiglu.linear_a.weight,
            self.swiglu.linear_b.weight, self.linear_out.weight,
        )  # fmt: skip
        return forwards.transition(x, weights, self.layer_norm.eps, self.fallbacks) * mask


class _PairBias(Fused):
    mha: Any
    linear_z: Any

    def _attend(self, a: Tensor, bias: Tensor, mask: Tensor | None, precise: bool) -> Tensor:
        """a [*, N, c] normalised, bias [*', H, N, N], mask [*, N]."""
        mha = self.mha
        q, k, v = (
            linear(a).unflatten(-1, (mha.no_heads, -1))
            for linear in (mha.linear_q, mha.linear_k, mha.linear_v)
        )
        dtype = q.dtype
        if precise:
            q, k, v = q.float(), k.float(), v.float()
        o = forwards.shared_bias_attention(q, k, v, bias, keep(mask), self.fallbacks, self.products).to(dtype)
        return mha.linear_o(o * torch.sigmoid(mha.linear_g(a)))


class AttentionPairBias(_PairBias):
    """Attention with pair bias of the trunk."""

    layer_norm_a: Any
    layer_norm_z: Any

    def forward(
        self,
        a: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        *unused: Any,
        use_high_precision_attention: bool = False,
        **options: Any,
    ) -> Tensor:
        """The update of a [*, N, c]; z [*, N, N, c_z]; mask [*, N]."""
        bias, _ = forwards.pair_bias(z, self.layer_norm_z, self.linear_z, self.fused_ops, self.fallbacks)
        return self._attend(self.layer_norm_a(a), bias.movedim(0, -3), mask, use_high_precision_attention)


class DiffusionAttentionPairBias(_PairBias):
    """Attention with pair bias of the token transformer; z comes normalised."""

    layer_norm_a: Any
    linear_ada_out: Any

    def forward(
        self,
        a: Tensor,
        z: Tensor,
        s: Tensor,
        mask: Tensor | None = None,
        *unused: Any,
        use_high_precision_attention: bool = False,
        **options: Any,
    ) -> Tensor:
        """The update of a [*, N, c]; s [*, N, c_s]; z [*, N, N, c_z] with 1 where the samples share it."""
        bias = self.linear_z(z).movedim(-1, -3)
        update = self._attend(self.layer_norm_a(a, s), bias, mask, use_high_precision_attention)
        return torch.sigmoid(self.linear_ada_out(s)) * update


def check_multiplication(m: Any) -> str:
    """What does not fit the operator in a triangle multiplication with these names."""
    linears = (m.linear_a_p, m.linear_a_g, m.linear_b_p, m.linear_b_g, m.linear_z, m.linear_g)
    return first(
        affine(m.layer_norm_in, m.layer_norm_out),
        without_bias(linears),
        width("triangle_multiplication", max(m.linear_a_p.weight.shape)),
    )


def check_attention(m: Any, bias: Any) -> str:
    """What does not fit the operators in a triangle attention whose pair bias is projected by `bias`."""
    if m.mha.linear_g is None:
        return "attention without a gate"
    linears = (bias, m.mha.linear_q, m.mha.linear_k, m.mha.linear_v, m.mha.linear_g)
    return first(
        affine(m.layer_norm),
        without_bias(linears),
        head_size(m.mha.linear_q.out_features, m.no_heads),
        width("triangle_attention", bias.in_features),
    )


def _check_transition(m: Any) -> str:
    linears = (m.swiglu.linear_a, m.swiglu.linear_b, m.linear_out)
    return first(affine(m.layer_norm), without_bias(linears), width("transition", m.linear_out.out_features))


def _check_pair_bias(m: Any) -> str:
    if m.mha.linear_g is None:
        return "attention without a gate"
    return head_size(m.mha.linear_q.out_features, m.mha.no_heads)


_LAYERS = "openfold3.core.model.layers."
RECIPES = {
    f"{_LAYERS}triangular_multiplicative_update.TriangleMultiplicativeUpdate": Recipe(
        "triangle_multiplication", TriangleMultiplication, check_multiplication
    ),
    f"{_LAYERS}triangular_attention.TriangleAttention": Recipe(
        "triangle_attention", TriangleAttention, lambda m: check_attention(m, m.linear_z)
    ),
    f"{_LAYERS}transition.SwiGLUTransition": Recipe("transition", Transition, _check_transition),
    f"{_LAYERS}attention_pair_bias.AttentionPairBias": Recipe(
        "attention_pair_bias", AttentionPairBias, _check_pair_bias
    ),
    f"{_LAYERS}attention_pair_bias.DiffusionAttentionPairBias": Recipe(
        "attention_pair_bias", DiffusionAttentionPairBias, _check_pair_bias
    ),
}
WITHOUT_OPERATOR = {
    f"{_LAYERS}outer_product_mean.OuterProductMean": "outer product mean",
    f"{_LAYERS}msa.MSAPairWeightedAveraging": "pair-weighted averaging",
    f"{_LAYERS}attention_pair_bias.CrossAttentionPairBias": "windowed attention",
    f"{_LAYERS}transition.ConditionedTransitionBlock": "conditioned transition",
    f"{_LAYERS}triangular_multiplicative_update.FusedTriangleMultiplicativeUpdate": (
        "projections fused as in AlphaFold-Multimer"
    ),
}
