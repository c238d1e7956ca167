"""The updates of AF3 on fused operators, for the modules of any library: layouts, masks, bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.ops import adaptive_layer_norm as adaptive_op
from optimized.ops import attention as attention_op
from optimized.ops import conditioned_transition as conditioned_op
from optimized.ops import gated_output as output_op
from optimized.ops import layer_norm_linear as norm_linear_op
from optimized.ops import outer_product_mean as outer_op
from optimized.ops import pair_weighted_averaging as averaging_op
from optimized.ops import transition as transition_op
from optimized.ops import triangle_attention as triangle_attention_op
from optimized.ops import triangle_multiplication as multiplication_op
from optimized.ops.conditioned_transition import ConditionedWeights
from optimized.ops.outer_product_mean import OuterWeights
from optimized.ops.triangle_attention import Orientation, TriangleAttentionWeights
from optimized.ops.triangle_multiplication import JointWeights, TriangleWeights
from optimized.recipes import Fallbacks, affine, first, width, without_bias


class Into(NamedTuple):
    """Where an update goes: residual + keep ⊙ update."""

    residual: Tensor
    """`[..., I, J, c]`"""
    keep: Tensor | None
    """Factors of shared dropout, 1 / (1 - p) or 0, with an axis of one along which they are shared."""

    def turned(self) -> Into:
        """The same for an update with rows and columns exchanged."""
        flip = None if self.keep is None else self.keep.transpose(-3, -2)
        return Into(self.residual.transpose(-3, -2), flip)

    def each(self, z: Tensor, structures: Sequence[Tensor]) -> list[Into]:
        """The same for every structure `[I, J, c]` of a batch z `[*, I, J, c]`; z itself is told by being the same tensor."""
        lead = z.shape[:-3]
        residuals = structures
        if self.residual is not z:
            residuals = self.residual.reshape(-1, *self.residual.shape[-3:]).unbind(0)
        if self.keep is None:
            return [Into(residual, None) for residual in residuals]
        keeps = self.keep.expand(*lead, *self.keep.shape[-3:]).reshape(-1, *self.keep.shape[-3:]).unbind(0)
        return [Into(residual, keep) for residual, keep in zip(residuals, keeps, strict=True)]


class GatedOutput(NamedTuple):
    """The end of an update as one operator: gate, output projection and, with `into`, dropout and residual."""

    weight: Tensor
    """`[c, h]`, no bias."""
    into: Into | None = None

    def __call__(self, x: Tensor, gate: Tensor, fallbacks: Fallbacks) -> Tensor:
        """From the values and the gate before its sigmoid, both [..., h]."""
        into = (None, None) if self.into is None else self.into
        fallbacks.check("gated_output", output_op.supported(x, gate, self.weight, *into))
        return output_op.gated_output(x, gate, self.weight, *into)


def ending(linear: Any, fused_ops: frozenset[str], into: Into | None = None) -> Any:
    """The end of an update with output projection `linear`: one operator where it was asked for and has no bias."""
    if into is None and ("gated_output" not in fused_ops or linear.bias is not None):
        return linear
    return GatedOutput(linear.weight, into)


def add_update(update: Tensor, into: Into, fallbacks: Fallbacks) -> Tensor:
    """residual + keep ⊙ update in one pass."""
    fallbacks.check("gated_output", output_op.update_supported(into.residual, update, into.keep))
    return output_op.add_update(into.residual, update, into.keep)


class AdaptiveGate(NamedTuple):
    """Parameters of an adaptive output gate; c channels, conditioning of c_s."""

    weight: Tensor
    """`[c, c_s]`"""
    bias: Tensor
    """`[c]`"""


def conditioned_output(
    x: Tensor, gate: Tensor, weight: Tensor, s: Tensor, outer: AdaptiveGate, fallbacks: Fallbacks
) -> Tensor:
    """Gated output projection with an adaptive output gate (AF3 Algorithm 24 with conditioning)."""
    fallbacks.check("gated_output", output_op.conditioned_supported(x, gate, weight, s, *outer))
    return output_op.conditioned_output(x, gate, weight, s, *outer)


def keep(mask: Tensor | None) -> Tensor | None:
    """A mask of zeros and ones, of any dtype, as a boolean one."""
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def triangle_attention(
    z: Tensor,
    weights: TriangleAttentionWeights,
    heads: int,
    way: Orientation,
    mask: Tensor | None,
    eps: float,
    fallbacks: Fallbacks,
    out_bias: Tensor | None = None,
    into: Into | None = None,
) -> Tensor:
    """Triangle attention (AF3 Algorithms 14 and 15) on z [*, N, N, c], or with `into` that added to a residual.

    `mask` [*, N, N] says which keys z_ij take part, True = keep; `out_bias` [c] is that of the output projection. A z
    that is a transposed view is not copied: the attention runs over its other axis. A row without any key gives zero.
    """
    if z.stride(-3) < z.stride(-2):
        turned = Orientation(not way.columns, not way.flipped)
        mask = None if mask is None else mask.transpose(-1, -2)
        flat = z.transpose(-3, -2)
        if into is not None:
            into = into.turned()._replace(residual=flat) if into.residual is z else into.turned()
        update = triangle_attention(flat, weights, heads, turned, mask, eps, fallbacks, out_bias, into)
        return update.transpose(-3, -2)
    target = (None, None) if into is None else into
    fallbacks.check("triangle_attention", triangle_attention_op.supported(z, weights, heads, mask, *target))
    update = triangle_attention_op.triangle_attention(z, weights, heads, way, mask, eps, *target)
    return update if out_bias is None else update + out_bias.to(update.dtype)


def pair_bias(
    z: Tensor, norm: Any, linear: Any, fused_ops: frozenset[str], fallbacks: Fallbacks
) -> tuple[Tensor, Tensor]:
    """Biases of attention (AF3 Algorithm 24, line 3), [H, *, N, N] from z [*, N, N, c] by a layer norm and a projection.

    One operator where "layer_norm_linear" was asked for and it takes these modules, else the modules themselves. The second
    result is z, for what comes after: the operator adds its gradient to that through the biases.
    """
    if "layer_norm_linear" not in fused_ops or bias_obstacle(norm, linear):
        return linear(norm(z)).movedim(-1, 0), z
    parts = (norm.weight, norm.bias)
    fallbacks.check("layer_norm_linear", norm_linear_op.supported(z, *parts, [], linear.weight))
    bias, z = norm_linear_op.layer_norm_linear(z, *parts, [], linear.weight, norm.eps, carried=True)
    return bias, z


def bias_obstacle(norm: Any, linear: Any) -> str:
    """What keeps a projection of pair biases out of the operator; nothing if it takes it."""
    return first(affine(norm), without_bias((linear,)), width("layer_norm_linear", linear.in_features))


def shared_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    fallbacks: Fallbacks,
    products: str,
) -> Tensor:
    """Attention of any number of samples with pair bias (AF3 Algorithm 24, lines 9 and 10).

    q [*, L, H, d], k and v [*, K, H, d]; bias [*', H, L, K] and mask [*'', K] (True = keep) broadcast to the
    leading axes of q. The trailing leading axes along which the bias does not vary share it, without a copy.
    `products` says how those of float32 are taken: see `optimized.apply`. Returns [*, L, H·d].
    """
    lead = q.shape[:-3]
    bias = bias[(None,) * (len(lead) + 3 - bias.dim())]
    own = len(lead)
    while own and bias.shape[own - 1] == 1:
        own -= 1
    rows = math.prod(lead[own:])
    q, k, v = (x.reshape(*lead[:own], rows, *x.shape[-3:]).transpose(-3, -2) for x in (q, k, v))
    pairs = bias.shape[-3:]
    bias = bias.reshape(*bias.shape[:own], *pairs).expand(*lead[:own], *pairs).unsqueeze(-4)
    if mask is not None:
        mask = mask.expand(*lead, mask.shape[-1]).reshape(*lead[:own], rows, mask.shape[-1])
    fallbacks.check("attention_pair_bias", attention_op.supported(q, k, v, bias, mask))
    x = attention_op.attention(q, k, v, bias, mask, precision=products).transpose(-3, -2)
    return x.reshape(*lead, *x.shape[-3:]).flatten(-2)


def triangle_multiplication(
    z: Tensor,
    weights: TriangleWeights | JointWeights,
    outgoing: bool,
    mask: Tensor | None,
    eps: float,
    fallbacks: Fallbacks,
    into: Into | None = None,
) -> Tensor:
    """Triangle multiplication (AF3 Algorithms 12 and 13) on z [*, N, N, c], or with `into` that added to a residual.

    `mask` [*, N, N], True = keep. The operator takes one structure, so a batch is taken one by one.
    """
    lead = z.shape[:-3]
    if not lead:
        target = (None, None) if into is None else into
        fallbacks.check("triangle_multiplication", multiplication_op.supported(z, weights, mask, *target))
        return multiplication_op.triangle_multiplication(z, weights, outgoing, mask, eps, *target)
    if math.prod(lead) == 1:  # a view, whose gradient is one too: that of unbinding is a copy
        flat = z.reshape(z.shape[-3:])
        mask = None if mask is None else mask.reshape(mask.shape[-2:])
        into = None if into is None else into.each(z, [flat])[0]
        return triangle_multiplication(flat, weights, outgoing, mask, eps, fallbacks, into).view(z.shape)
    structures = z.flatten(0, len(lead) - 1).unbind(0)
    masks: Sequence[Tensor | None] = (None,) * len(structures)
    if mask is not None:
        masks = mask.expand(z.shape[:-1]).reshape(-1, *mask.shape[-2:]).unbind(0)
    targets = [None] * len(structures) if into is None else into.each(z, structures)
    updates = [
        triangle_multiplication(one, weights, outgoing, m, eps, fallbacks, target)
        for one, m, target in zip(structures, masks, targets, strict=True)
    ]
    return torch.stack(updates).unflatten(0, lead)


class TransitionWeights(NamedTuple):
    """Parameters of one transition; c channels, h hidden channels, no biases."""

    norm_weight: Tensor
    """`[c]`"""
    norm_bias: Tensor
    """`[c]`"""
    a: Tensor
    """`[h, c]`, the branch through swish."""
    b: Tensor
    """`[h, c]`"""
    out: Tensor
    """`[c, h]`"""


def transition(
    x: Tensor, weights: TransitionWeights, eps: float, fallbacks: Fallbacks, added: bool = False
) -> Tensor:
    """Transition (AF3 Algorithm 11) on x [..., c], without the residual or, if `added`, with it: x itself."""
    fallbacks.check("transition", transition_op.supported(x, *weights))
    return transition_op.transition(x, *weights, eps, added)


def adds(update: Any) -> bool:
    """Whether a module, replaced or not, can add its update to the residual itself.

    Hooks on it are to be handed the update itself, so they cost the fusion.
    """
    return getattr(update, "adds", False) and not update._forward_hooks


def carries(attention: Any) -> bool:
    """Whether a module, replaced or not, can hand on the z that it takes its biases from: as `adds`, unless it has hooks."""
    return getattr(attention, "carries", False) and not attention._forward_hooks


def with_update(
    update: Any, x: Tensor, into: Into, fallbacks: Fallbacks, options: Mapping[str, Any]
) -> Tensor:
    """The residual of `into` + keep ⊙ update(x, **options), in one operator where the module takes `into` itself."""
    if adds(update):
        added: Tensor = update(x, **options, into=into)
        return added
    return add_update(update(x, **options), into, fallbacks)


def with_transition(update: Any, x: Tensor) -> Tensor:
    """x + update(x), in one operator where `update` is a transition that was replaced."""
    if adds(update):
        added: Tensor = update(x, added=True)
        return added
    return x + update(x)


class AdaptiveWeights(NamedTuple):
    """Parameters of one adaptive layer norm; c_a channels, conditioning of c_s."""

    norm_weight: Tensor
    """`[c_s]`, scale of the norm of s."""
    scale: Tensor
    """`[c_a, c_s]`"""
    scale_bias: Tensor
    """`[c_a]`"""
    shift: Tensor
    """`[c_a, c_s]`"""


def adaptive_layer_norm(
    a: Tensor, s: Tensor, weights: AdaptiveWeights, eps: float, fallbacks: Fallbacks
) -> Tensor:
    """Adaptive layer norm (AF3 Algorithm 26) of a [*, N, c_a] given s [*', N, c_s], shared by the other axes of a."""
    fallbacks.check("adaptive_layer_norm", adaptive_op.supported(a, s, *weights))
    return adaptive_op.adaptive_layer_norm(a, s, *weights, eps)


def conditioned_transition(
    a: Tensor, s: Tensor, weights: ConditionedWeights, eps: float, fallbacks: Fallbacks
) -> Tensor:
    """Conditioned transition (AF3 Algorithm 25) on a [*, N, c_a] given s [*', N, c_s], without the residual."""
    fallbacks.check("conditioned_transition", conditioned_op.supported(a, s, weights))
    return conditioned_op.conditioned_transition(a, s, weights, eps)


def outer_product_mean(
    m: Tensor, mask: Tensor, weights: OuterWeights, norm_eps: float, eps: float, fallbacks: Fallbacks
) -> Tensor:
    """Outer product mean (AF3 Algorithm 9) [N, N, c_z] of m [S, N, c_m], mask [S, N] True = keep, without residual."""
    fallbacks.check("outer_product_mean", outer_op.supported(m, mask, weights))
    return outer_op.outer_product_mean(m, mask, weights, norm_eps, eps)


class AveragingWeights(NamedTuple):
    """Parameters of one pair-weighted averaging; c_m channels of the MSA, c_z of the pair, h heads of width d."""

    norm_m: tuple[Tensor, Tensor]
    """Scale and offset `[c_m]`."""
    norm_z: tuple[Tensor, Tensor]
    """Scale and offset `[c_z]`."""
    z: Tensor
    """`[h, c_z]`"""
    v: Tensor
    """`[h·d, c_m]`"""
    g: Tensor
    """`[h·d, c_m]`, the output gate."""


def pair_weighted_averaging(
    m: Tensor,
    z: Tensor,
    mask: Tensor | None,
    weights: AveragingWeights,
    eps: float,
    out: Callable[[Tensor], Tensor] | GatedOutput,
    fallbacks: Fallbacks,
) -> Tensor:
    """Pair-weighted averaging (AF3 Algorithm 10) of m [S, N, c_m] with weights from z [N, N, c_z].

    `mask` [N], True = keep as key; `out` is the output projection, or the whole end of the update as one operator.
    Values and gate read m once, and the weights are the only N² intermediate. Without any key the average is zero.
    """
    values, projections = [weights.v, weights.g], (weights.norm_m, weights.norm_z)
    for x, norm, maps in zip((m, z), projections, (values, [weights.z]), strict=True):
        fallbacks.check("layer_norm_linear", norm_linear_op.supported(x, *norm, maps))
    v, g = norm_linear_op.layer_norm_linear(m, *weights.norm_m, values, None, eps)
    (logits,) = norm_linear_op.layer_norm_linear(z, *weights.norm_z, [weights.z], None, eps)
    v, logits = v.unflatten(-1, (weights.z.shape[0], -1)), logits.movedim(-1, 0)
    fallbacks.check("pair_weighted_averaging", averaging_op.supported(v, logits, mask))
    x = averaging_op.weighted_average(v, logits, mask).flatten(-2)
    return out(x, g, fallbacks) if isinstance(out, GatedOutput) else out(x * torch.sigmoid(g))
