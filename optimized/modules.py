"""The baseline's modules on fused operators, with exactly the baseline's parameters and results.

Each class is the baseline's own with another forward, so it can be built in its place or, which
`optimized.apply` does, an existing module can become one by changing its class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.af3 import attention_pair_bias, primitives, triangle
from baselines.af3.primitives import LayerNorm
from optimized import forwards
from optimized.forwards import AdaptiveWeights, Orientation, TransitionWeights, TriangleAttentionWeights
from optimized.ops.conditioned_transition import ConditionedWeights
from optimized.ops.triangle_multiplication import TriangleWeights
from optimized.recipes import Fused, Recipe, adaptive, affine, first, head_size, width, without_bias


def _pairs(mask: Tensor | None) -> Tensor | None:
    """[N] tokens to keep as [N, N] pairs to keep."""
    return None if mask is None else mask[:, None] & mask[None, :]


class TriangleMultiplication(Fused, triangle.TriangleMultiplication):
    """Triangle multiplication (AF3 Algorithms 12 and 13) as one operator."""

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The update of z [N, N, c_z], without the residual. `mask` [N]: tokens to keep."""
        norm_in, norm_out = self.layer_norm_in, self.layer_norm_out
        assert norm_in.weight is not None and norm_in.bias is not None
        assert norm_out.weight is not None and norm_out.bias is not None
        weights = TriangleWeights(
            norm_in.weight, norm_in.bias,
            self.linear_a_p.weight, self.linear_a_g.weight, self.linear_b_p.weight, self.linear_b_g.weight,
            norm_out.weight, norm_out.bias, self.linear_z.weight, self.linear_g.weight,
        )  # fmt: skip
        return forwards.triangle_multiplication(
            z, weights, self.outgoing, _pairs(mask), norm_in.eps, self.fallbacks
        )


class TriangleAttention(Fused, triangle.TriangleAttention):
    """Triangle attention (AF3 Algorithms 14 and 15): two operators and the output projection."""

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The update of z [N, N, c_z], without the residual. `mask` [N]: tokens to keep as keys."""
        norm = self.layer_norm
        assert norm.weight is not None and norm.bias is not None
        weights = TriangleAttentionWeights(
            norm.weight, norm.bias,
            self.linear_q.weight, self.linear_k.weight, self.linear_v.weight, self.linear_g.weight,
            self.linear_bias.weight,
        )  # fmt: skip
        way = Orientation(not self.starting, not self.starting and self.bias_orientation == "ki")
        keys = None
        if mask is not None:
            keys = (mask[None, :] if self.starting else mask[:, None]).expand(z.shape[:2])
        return forwards.triangle_attention(
            z, weights, self.heads, way, self.linear_o, keys, norm.eps, self.fallbacks
        )


class Transition(Fused, primitives.Transition):
    """Transition (AF3 Algorithm 11) as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """The update of [..., c], without the residual."""
        norm = self.layer_norm
        assert norm.weight is not None and norm.bias is not None
        weights = TransitionWeights(
            norm.weight, norm.bias, self.linear_a.weight, self.linear_b.weight, self.linear_out.weight
        )
        return forwards.transition(x, weights, norm.eps, self.fallbacks)


class AttentionPairBias(Fused, attention_pair_bias.AttentionPairBias):
    """Token attention with pair bias (AF3 Algorithm 24): the attention is an operator, shared by all samples."""

    def forward(self, a: Tensor, bias: Tensor, s: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The update of a, without the residual.

        a [N, c_a] or [D, N, c_a] with D samples; bias [heads, N, N], shared by the samples; s as a, with
        c_s channels; mask [N] tokens to keep as keys.
        """
        a = self._normalise(a, s)
        q, k, v = (
            linear(a).unflatten(-1, (self.heads, -1))
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        x = forwards.shared_bias_attention(q, k, v, bias, mask, self.fallbacks)
        x = self.linear_o(x * torch.sigmoid(self.linear_g(a)))
        if self.linear_s is not None and s is not None:
            x = x * torch.sigmoid(self.linear_s(s))
        return x


def _adaptive_weights(m: primitives.AdaptiveLayerNorm) -> AdaptiveWeights:
    norm = m.layer_norm_s
    assert norm.weight is not None
    return AdaptiveWeights(norm.weight, m.linear_scale.weight, m.linear_scale.bias, m.linear_shift.weight)


class AdaptiveLayerNorm(Fused, primitives.AdaptiveLayerNorm):
    """Adaptive layer norm (AF3 Algorithm 26) as one operator."""

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """[..., N, c_a] from a of that shape and s [..., N, c_s], broadcast over leading dimensions."""
        eps = self.layer_norm_a.eps
        return forwards.adaptive_layer_norm(a, s, _adaptive_weights(self), eps, self.fallbacks)


class ConditionedTransition(Fused, primitives.ConditionedTransition):
    """Conditioned transition (AF3 Algorithm 25) as one operator, its adaptive layer norm included."""

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """The update of a [..., N, c_a] given s [..., N, c_s], without the residual."""
        weights = ConditionedWeights(
            *_adaptive_weights(self.ada_ln),
            self.linear_a.weight, self.linear_b.weight, self.linear_out.weight,
            self.linear_s.weight, self.linear_s.bias,
        )  # fmt: skip
        eps = self.ada_ln.layer_norm_a.eps
        return forwards.conditioned_transition(a, s, weights, eps, self.fallbacks)


def _check_multiplication(m: triangle.TriangleMultiplication) -> str:
    widest = max(m.layer_norm_in.c, m.layer_norm_out.c)
    return first(affine(m.layer_norm_in, m.layer_norm_out), width("triangle_multiplication", widest))


def _check_attention(m: triangle.TriangleAttention) -> str:
    projections = (m.linear_q, m.linear_k, m.linear_v, m.linear_g, m.linear_bias)
    return first(
        affine(m.layer_norm),
        without_bias(projections),
        head_size(m.linear_q.out_features, m.heads),
        width("triangle_attention", m.layer_norm.c),
    )


def _check_transition(m: primitives.Transition) -> str:
    norm: LayerNorm = m.layer_norm
    return first(affine(norm), width("transition", norm.c))


def _check_pair_bias(m: attention_pair_bias.AttentionPairBias) -> str:
    return head_size(m.linear_q.out_features, m.heads)


def _check_adaptive(m: primitives.AdaptiveLayerNorm) -> str:
    widest = max(m.layer_norm_a.c, m.layer_norm_s.c)
    return first(adaptive(m.layer_norm_a, m.layer_norm_s), width("adaptive_layer_norm", widest))


def _check_conditioned(m: primitives.ConditionedTransition) -> str:
    return _check_adaptive(m.ada_ln)


RECIPES = {
    "baselines.af3.triangle.TriangleMultiplication": Recipe(
        "triangle_multiplication", TriangleMultiplication, _check_multiplication
    ),
    "baselines.af3.triangle.TriangleAttention": Recipe(
        "triangle_attention", TriangleAttention, _check_attention
    ),
    "baselines.af3.primitives.Transition": Recipe("transition", Transition, _check_transition),
    "baselines.af3.attention_pair_bias.AttentionPairBias": Recipe(
        "attention_pair_bias", AttentionPairBias, _check_pair_bias
    ),
    "baselines.af3.primitives.AdaptiveLayerNorm": Recipe(
        "adaptive_layer_norm", AdaptiveLayerNorm, _check_adaptive
    ),
    "baselines.af3.primitives.ConditionedTransition": Recipe(
        "conditioned_transition", ConditionedTransition, _check_conditioned
    ),
}

WITHOUT_OPERATOR = {
    "baselines.af3.msa.OuterProductMean": "outer product mean",
    "baselines.af3.msa.PairWeightedAveraging": "pair-weighted averaging",
    "baselines.af3.atom_attention.AtomAttention": "windowed attention",
}
"""Classes that stay as they are, and what they would need an operator for."""
