"""The baseline's modules on fused operators, with exactly the baseline's parameters and results.

Each class is the baseline's own with another forward, so it can be built in its place or, which
`optimized.apply` does, an existing module can become one by changing its class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.af3 import attention_pair_bias, diffusion, msa, pairformer, primitives, triangle
from baselines.af3.primitives import LayerNorm, SharedDropout
from optimized import forwards
from optimized.forwards import (
    AdaptiveGate,
    AdaptiveWeights,
    AveragingWeights,
    GatedOutput,
    Into,
    TransitionWeights,
)
from optimized.ops.conditioned_transition import ConditionedWeights
from optimized.ops.launching import compute_dtype
from optimized.ops.linear import op as linear_op
from optimized.ops.outer_product_mean import OuterWeights
from optimized.ops.triangle_attention import Orientation, TriangleAttentionWeights
from optimized.ops.triangle_multiplication import TriangleWeights
from optimized.recipes import (
    Fused,
    Recipe,
    adaptive,
    affine,
    averaging_size,
    first,
    head_size,
    width,
    without_bias,
)


def _pairs(mask: Tensor | None) -> Tensor | None:
    """[N] tokens to keep as [N, N] pairs to keep."""
    return None if mask is None else mask[:, None] & mask[None, :]


class TriangleMultiplication(Fused, triangle.TriangleMultiplication):
    """Triangle multiplication (AF3 Algorithms 12 and 13) as one operator."""

    adds = True

    def forward(self, z: Tensor, mask: Tensor | None = None, into: Into | None = None) -> Tensor:
        """The update of z [N, N, c_z], or with `into` that added to a residual. `mask` [N]: tokens to keep."""
        norm_in, norm_out = self.layer_norm_in, self.layer_norm_out
        assert norm_in.weight is not None and norm_in.bias is not None
        assert norm_out.weight is not None and norm_out.bias is not None
        weights = TriangleWeights(
            norm_in.weight, norm_in.bias,
            self.linear_a_p.weight, self.linear_a_g.weight, self.linear_b_p.weight, self.linear_b_g.weight,
            norm_out.weight, norm_out.bias, self.linear_z.weight, self.linear_g.weight,
        )  # fmt: skip
        return forwards.triangle_multiplication(
            z, weights, self.outgoing, _pairs(mask), norm_in.eps, self.fallbacks, into
        )


class TriangleAttention(Fused, triangle.TriangleAttention):
    """Triangle attention (AF3 Algorithms 14 and 15) as one operator."""

    adds = True

    def forward(self, z: Tensor, mask: Tensor | None = None, into: Into | None = None) -> Tensor:
        """The update of z [N, N, c_z], or with `into` that added to a residual. `mask` [N]: tokens to keep as keys."""
        norm = self.layer_norm
        assert norm.weight is not None and norm.bias is not None
        weights = TriangleAttentionWeights(
            norm.weight, norm.bias,
            self.linear_q.weight, self.linear_k.weight, self.linear_v.weight, self.linear_g.weight,
            self.linear_bias.weight, self.linear_o.weight,
        )  # fmt: skip
        way = Orientation(not self.starting, not self.starting and self.bias_orientation == "ki")
        keys = None
        if mask is not None:
            keys = (mask[None, :] if self.starting else mask[:, None]).expand(z.shape[:2])
        return forwards.triangle_attention(
            z, weights, self.heads, way, keys, norm.eps, self.fallbacks, self.linear_o.bias, into
        )


class Transition(Fused, primitives.Transition):
    """Transition (AF3 Algorithm 11) as one operator."""

    adds = True

    def forward(self, x: Tensor, added: bool = False) -> Tensor:
        """The update of x [..., c], or, if `added`, x and that."""
        norm = self.layer_norm
        assert norm.weight is not None and norm.bias is not None
        weights = TransitionWeights(
            norm.weight, norm.bias, self.linear_a.weight, self.linear_b.weight, self.linear_out.weight
        )
        return forwards.transition(x, weights, norm.eps, self.fallbacks, added)


class Linear(Fused, primitives.Linear):
    """Linear layer whose products of float32 are three TF32 products each; in another dtype as it was."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., c_in] to [..., c_out]."""
        if compute_dtype(x) != torch.float32:
            return super().forward(x)
        self.fallbacks.check("linear", linear_op.supported(x, self.weight, self.bias))
        return linear_op.linear(x, self.weight, self.bias)


class PairBias(Fused, attention_pair_bias.PairBias):
    """Biases of token attention (AF3 Algorithm 24, line 3): LayerNorm and projection as one operator."""

    def forward(self, z: Tensor) -> Tensor:
        """[heads, ..., N] from z [..., N, c_z]."""
        return forwards.pair_bias(z, self.layer_norm, self.linear, self.fused_ops, self.fallbacks)[0]


class AttentionPairBias(Fused, attention_pair_bias.AttentionPairBias):
    """Token attention with pair bias (AF3 Algorithm 24): the attention is an operator, shared by all samples."""

    whole = False

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
        x = forwards.shared_bias_attention(q, k, v, bias, mask, self.fallbacks, self.products)
        gate, weight, outer = self.linear_g(a), self.linear_o.weight, self.linear_s
        if "gated_output" not in self.fused_ops:
            x = self.linear_o(x * torch.sigmoid(gate))
            return x if outer is None or s is None else x * torch.sigmoid(outer(s))
        if outer is None or s is None:
            return GatedOutput(weight)(x, gate, self.fallbacks)
        adaptive_gate = AdaptiveGate(outer.weight, outer.bias)
        return forwards.conditioned_output(x, gate, weight, s, adaptive_gate, self.fallbacks)


class TokenTransformer(Fused, diffusion.TokenTransformer):
    """The token transformer (AF3 Algorithm 23) whose shared pair biases come head by head, as attention reads them."""

    whole = False

    def _shared(self, layer_norm: LayerNorm, a: Tensor, s: Tensor, z: Tensor) -> Tensor:
        pairs = layer_norm(z).flatten(0, -2)
        for group, linear in enumerate(self.pair_biases):
            # W·zᵀ instead of z·Wᵀ: the same product, written with the heads first.
            assert isinstance(linear, primitives.Linear)
            biases = torch.mm(linear.weight, pairs.t()).view(self.super_block, self.heads, *z.shape[:-1])
            for index, bias in enumerate(biases.unbind(0)):
                a = self.blocks[group * self.super_block + index](a, s, bias)
        return a


class PairBlock(Fused, pairformer.PairBlock):
    """The pair half of a Pairformer block (AF3 Algorithm 17): every update goes into z with its dropout at once."""

    whole = False

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The new z [N, N, c_z]. `mask` [N]: tokens to keep."""
        for update, dropout in (
            (self.tri_mul_out, self.row_dropout),
            (self.tri_mul_in, self.row_dropout),
            (self.tri_att_start, self.row_dropout),
            (self.tri_att_end, self.column_dropout),
        ):
            z = forwards.with_update(update, z, _into(z, dropout), self.fallbacks, {"mask": mask})
        return forwards.with_transition(self.pair_transition, z)


class OuterProductMean(Fused, msa.OuterProductMean):
    """Outer product mean (AF3 Algorithm 9): two operators, a block of tokens at a time."""

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        """[N, N, c_z] from m [S, N, c_m] and mask [S, N] bool."""
        norm, out = self.layer_norm, self.linear_out
        assert norm.weight is not None and norm.bias is not None
        weights = OuterWeights(
            norm.weight, norm.bias, self.linear_a.weight, self.linear_b.weight, out.weight, out.bias
        )
        return forwards.outer_product_mean(m, mask, weights, norm.eps, self.eps, self.fallbacks)


class PairWeightedAveraging(Fused, msa.PairWeightedAveraging):
    """Pair-weighted averaging (AF3 Algorithm 10) on operators."""

    adds = True

    def forward(self, m: Tensor, z: Tensor, mask: Tensor, into: Into | None = None) -> Tensor:
        """The update of m [S, N, c_m] given z [N, N, c_z], or with `into` that added to a residual.

        `mask` [S, N]: a token absent from every row takes no part in the averages.
        """
        norm_m, norm_z = self.layer_norm_m, self.layer_norm_z
        assert norm_m.weight is not None and norm_m.bias is not None
        assert norm_z.weight is not None and norm_z.bias is not None
        weights = AveragingWeights(
            (norm_m.weight, norm_m.bias), (norm_z.weight, norm_z.bias),
            self.linear_z.weight, self.linear_v.weight, self.linear_g.weight,
        )  # fmt: skip
        out = forwards.ending(self.linear_o, self.fused_ops, into)
        return forwards.pair_weighted_averaging(
            m, z, mask.any(dim=0), weights, norm_m.eps, out, self.fallbacks
        )


class MSABlock(Fused, msa.MSABlock):
    """A block of the MSA module (AF3 Algorithm 8) whose averages go into m with their dropout at once."""

    whole = False

    def _update_msa(self, m: Tensor, z: Tensor, msa_mask: Tensor) -> Tensor:
        update = self.averaging
        if update is None or self.msa_transition is None:
            return m
        others = {"z": z, "mask": msa_mask}
        m = forwards.with_update(update, m, _into(m, self.msa_dropout), self.fallbacks, others)
        return forwards.with_transition(self.msa_transition, m)


def _into(residual: Tensor, dropout: SharedDropout) -> Into:
    """The residual, and the factors that `dropout` would draw for its update."""
    if not dropout.training or dropout.p == 0.0:
        return Into(residual, None)
    shape = list(residual.shape)
    shape[dropout.shared] = 1
    return Into(residual, F.dropout(residual.new_ones(shape, dtype=compute_dtype(residual)), dropout.p))


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


def _check_linear(m: primitives.Linear) -> str:
    thin = min(m.weight.shape) < linear_op.SMALLEST
    return first(
        "kept in float32 for lengths in Å" if m.precise else "",
        f"fewer than {linear_op.SMALLEST} channels on one side" if thin else "",
    )


def _check_bias(m: attention_pair_bias.PairBias) -> str:
    return forwards.bias_obstacle(m.layer_norm, m.linear)


def _check_token_transformer(m: diffusion.TokenTransformer) -> str:
    return "" if m.layer_norm_pair is not None else "biases that every block normalises by itself"


def _check_outer(m: msa.OuterProductMean) -> str:
    return first(
        affine(m.layer_norm),
        without_bias((m.linear_a, m.linear_b)),
        width("outer_product_mean", m.linear_out.out_features),
    )


def _check_averaging(m: msa.PairWeightedAveraging) -> str:
    return first(
        affine(m.layer_norm_m, m.layer_norm_z),
        without_bias((m.linear_z, m.linear_v, m.linear_g, m.linear_o)),
        averaging_size(m.linear_v.out_features, m.heads),
    )


def _check_msa_block(m: msa.MSABlock) -> str:
    return "" if m.averaging is None else without_bias((m.averaging.linear_o,))


def _check_pair_block(m: pairformer.PairBlock) -> str:
    return without_bias((m.tri_att_start.linear_o, m.tri_att_end.linear_o))


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
    "baselines.af3.primitives.Linear": Recipe("linear", Linear, _check_linear, ("tf32x3",), basic=True),
    "baselines.af3.attention_pair_bias.PairBias": Recipe("layer_norm_linear", PairBias, _check_bias),
    "baselines.af3.diffusion.TokenTransformer": Recipe(
        "attention_pair_bias", TokenTransformer, _check_token_transformer
    ),
    "baselines.af3.pairformer.PairBlock": Recipe("gated_output", PairBlock, _check_pair_block),
    "baselines.af3.msa.MSABlock": Recipe("gated_output", MSABlock, _check_msa_block),
    "baselines.af3.msa.OuterProductMean": Recipe("outer_product_mean", OuterProductMean, _check_outer),
    "baselines.af3.msa.PairWeightedAveraging": Recipe(
        "pair_weighted_averaging", PairWeightedAveraging, _check_averaging
    ),
    "baselines.af3.primitives.AdaptiveLayerNorm": Recipe(
        "adaptive_layer_norm", AdaptiveLayerNorm, _check_adaptive
    ),
    "baselines.af3.primitives.ConditionedTransition": Recipe(
        "conditioned_transition", ConditionedTransition, _check_conditioned
    ),
}

WITHOUT_OPERATOR = {
    "baselines.af3.atom_attention.AtomAttention": "windowed attention",
}
"""Classes that stay as they are, and what they would need an operator for."""
