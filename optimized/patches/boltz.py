"""Boltz 2.2: its modules on fused operators.

All are batched. Masks are floats, 1 = keep; its triangle products, in float32 without autocast, are taken in
the operand's dtype with float32 accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimized import forwards
from optimized.forwards import Into, TransitionWeights, keep
from optimized.ops.triangle_attention import Orientation, TriangleAttentionWeights
from optimized.ops.triangle_multiplication import JointWeights
from optimized.recipes import Fused, Recipe, affine, first, head_size, width, without_bias


class _TriangleMultiplication(Fused):
    adds = True
    outgoing: bool
    norm_in: Any
    norm_out: Any
    p_in: Any
    g_in: Any
    p_out: Any
    g_out: Any

    def forward(self, x: Tensor, mask: Tensor, use_kernels: bool = False, into: Into | None = None) -> Tensor:
        """The update of x [B, N, N, c], or with `into` that added to a residual; mask [B, N, N]."""
        weights = JointWeights(
            self.norm_in.weight, self.norm_in.bias, self.p_in.weight, self.g_in.weight,
            self.norm_out.weight, self.norm_out.bias, self.p_out.weight, self.g_out.weight,
        )  # fmt: skip
        return forwards.triangle_multiplication(
            x, weights, self.outgoing, keep(mask), self.norm_in.eps, self.fallbacks, into
        )


class Outgoing(_TriangleMultiplication):
    """Triangle multiplication, outgoing edges; the fused input projections hold a, then b."""

    outgoing = True


class Incoming(_TriangleMultiplication):
    """Triangle multiplication, incoming edges; the fused input projections hold a, then b."""

    outgoing = False


class TriangleAttention(Fused):
    """Triangle attention; the ending node reads the bias transposed with the input."""

    starting: bool
    no_heads: int
    layer_norm: Any
    linear: Any
    mha: Any

    @property
    def adds(self) -> bool:
        """The bias of the output projection is added to the update alone."""
        return self.mha.linear_o.bias is None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
        use_kernels: bool = False,
        into: Into | None = None,
    ) -> Tensor:
        """The update of x [*, N, N, c], or with `into` that added to a residual; mask [*, N, N]."""
        mha = self.mha
        weights = TriangleAttentionWeights(
            self.layer_norm.weight, self.layer_norm.bias, mha.linear_q.weight, mha.linear_k.weight,
            mha.linear_v.weight, mha.linear_g.weight, self.linear.weight, mha.linear_o.weight,
        )  # fmt: skip
        way = Orientation(columns=not self.starting, flipped=not self.starting)
        eps, out_bias = self.layer_norm.eps, mha.linear_o.bias
        return forwards.triangle_attention(
            x, weights, self.no_heads, way, keep(mask), eps, self.fallbacks, out_bias, into
        )


class Transition(Fused):
    """Transition."""

    adds = True
    norm: Any
    fc1: Any
    fc2: Any
    fc3: Any

    def forward(self, x: Tensor, chunk_size: int | None = None, added: bool = False) -> Tensor:
        """The update of x [..., c], or, if `added`, x and that."""
        weights = TransitionWeights(
            self.norm.weight, self.norm.bias, self.fc1.weight, self.fc2.weight, self.fc3.weight
        )
        return forwards.transition(x, weights, self.norm.eps, self.fallbacks, added)


class _PairUpdates(Fused):
    """The pair track of a Pairformer layer: every update goes into z with its dropout at once."""

    whole = False
    training: bool
    dropout: float
    tri_mul_out: Any
    tri_mul_in: Any
    tri_att_start: Any
    tri_att_end: Any
    transition_z: Any

    def _update_pairs(self, z: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        """z [B, N, N, c] after all updates of a layer; `options` are those that the library's modules take."""
        multiplying = {"use_kernels": options["mul"]}
        attending = {"chunk_size": options["chunk_size"], "use_kernels": options["attention"]}
        kept = keep(mask)
        for update, columns, theirs in (
            (self.tri_mul_out, False, multiplying),
            (self.tri_mul_in, False, multiplying),
            (self.tri_att_start, False, attending),
            (self.tri_att_end, True, attending),
        ):
            theirs["mask"] = kept if forwards.adds(update) else mask
            z = forwards.with_update(update, z, self._into(z, columns), self.fallbacks, theirs)
        return forwards.with_transition(self.transition_z, z)

    def _into(self, z: Tensor, columns: bool) -> Into:
        """z and the factors of dropout shared by rows, or by columns: float32, and drawn in evaluation too, as theirs."""
        p = self.dropout * self.training
        batch, rows, width, _ = z.shape
        shape = (batch, 1, width, 1) if columns else (batch, rows, 1, 1)
        factors = (torch.rand(shape, device=z.device) >= p) / (1.0 - p)
        return Into(z.to(torch.promote_types(z.dtype, factors.dtype)), factors if self.training else None)


class PairformerLayer(_PairUpdates):
    """A layer of the Pairformer (AF3 Algorithm 17)."""

    pre_norm_s: Any
    attention: Any
    transition_s: Any
    s_post_norm: Any

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        mask: Tensor,
        pair_mask: Tensor,
        chunk_size_tri_attn: int | None = None,
        use_kernels: bool = False,
        use_cuequiv_mul: bool = False,
        use_cuequiv_attn: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The new s [B, N, c_s] and z [B, N, N, c_z]; mask [B, N], pair_mask [B, N, N]. Single track in float32."""
        z = self._update_pairs(
            z, pair_mask, _options(chunk_size_tri_attn, use_kernels, use_cuequiv_mul, use_cuequiv_attn)
        )
        with torch.autocast("cuda", enabled=False):
            s = s.float()
            normed = self.pre_norm_s(s)
            inputs = {"s": normed, "mask": mask.float(), "k_in": normed}
            if z.dtype == torch.float32 and forwards.carries(self.attention):
                update, z = self.attention(**inputs, z=z, carried=True)
            else:
                update = self.attention(**inputs, z=z.float())
            s = self.s_post_norm(forwards.with_transition(self.transition_s, s + update))
        return s, z


class PairformerNoSeqLayer(_PairUpdates):
    """A layer of the Pairformer without its single track."""

    def forward(
        self,
        z: Tensor,
        pair_mask: Tensor,
        chunk_size_tri_attn: int | None = None,
        use_kernels: bool = False,
        use_cuequiv_mul: bool = False,
        use_cuequiv_attn: bool = False,
    ) -> Tensor:
        """The new z [B, N, N, c_z]; pair_mask [B, N, N]."""
        options = _options(chunk_size_tri_attn, use_kernels, use_cuequiv_mul, use_cuequiv_attn)
        return self._update_pairs(z, pair_mask, options)


def _options(chunk_size: int | None, kernels: bool, mul: bool, attention: bool) -> dict[str, Any]:
    return {"chunk_size": chunk_size, "mul": mul or kernels, "attention": attention or kernels}


class _PairBias(Fused):
    num_heads: int
    proj_q: Any
    proj_k: Any
    proj_v: Any
    proj_g: Any
    proj_o: Any
    proj_z: Any

    def _bias(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, L, K] from z [B, L, K, c_z], or from [B, L, K, H] where there is nothing to project; and z."""
        if not isinstance(self.proj_z, nn.Sequential):
            return self.proj_z(z), z
        norm, linear = self.proj_z[0], self.proj_z[1]
        bias, z = forwards.pair_bias(z, norm, linear, self.fused_ops, self.fallbacks)
        return bias.movedim(0, 1), z

    def _attend(self, s: Tensor, k_in: Tensor, bias: Tensor, mask: Tensor, multiplicity: int) -> Tensor:
        """s [B·M, L, c], k_in [B·M, K, c], bias [B, H, L, K], mask [B·M, K]; M samples share a bias."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).unflatten(0, (-1, multiplicity))

        q, k, v = split(self.proj_q(s)), split(self.proj_k(k_in)), split(self.proj_v(k_in))
        kept = keep(mask.expand(s.shape[0], -1).unflatten(0, (-1, multiplicity)))
        o = forwards.shared_bias_attention(q, k, v, bias.unsqueeze(1), kept, self.fallbacks, self.products)
        return self.proj_o(self.proj_g(s).sigmoid() * o.flatten(0, 1))


class AttentionPairBias(_PairBias):
    """Attention with pair bias of Boltz-2 (`attentionv2`)."""

    carries = True

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        mask: Tensor,
        k_in: Tensor,
        multiplicity: int = 1,
        carried: bool = False,
    ) -> Any:
        """The update of s [B·M, L, c], and with `carried` z for what comes after.

        z [B, L, K, c_z] or, without a projection of its own, [B, L, K, H].
        """
        bias, z = self._bias(z)
        update = self._attend(s, k_in, bias, mask, multiplicity)
        return (update, z) if carried else update


class FirstAttentionPairBias(_PairBias):
    """Attention with pair bias of Boltz-1 (`attention`), which normalises s itself."""

    initial_norm: bool
    norm_s: Any

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        mask: Tensor,
        multiplicity: int = 1,
        to_keys: Any = None,
        model_cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The update of s [B·M, L, c]; the projected z [B, L, K, c_z] is kept in `model_cache` if there is one."""
        if self.initial_norm:
            s = self.norm_s(s)
        k_in = s
        if to_keys is not None:
            k_in, mask = to_keys(s), to_keys(mask.unsqueeze(-1)).squeeze(-1)
        bias = None if model_cache is None else model_cache.get("z")
        if bias is None:
            bias, _ = self._bias(z)
            if model_cache is not None:
                model_cache["z"] = bias
        return self._attend(s, k_in, bias, mask, multiplicity)


def _check_multiplication(m: Any) -> str:
    linears = (m.p_in, m.g_in, m.p_out, m.g_out)
    return first(
        affine(m.norm_in, m.norm_out),
        without_bias(linears),
        width("triangle_multiplication", m.p_out.in_features),
    )


def _check_attention(m: Any) -> str:
    if m.mha.linear_g is None:
        return "attention without a gate"
    linears = (m.linear, m.mha.linear_q, m.mha.linear_k, m.mha.linear_v, m.mha.linear_g)
    return first(
        affine(m.layer_norm),
        without_bias(linears),
        head_size(m.mha.linear_q.out_features, m.no_heads),
        width("triangle_attention", m.linear.in_features),
    )


def _check_transition(m: Any) -> str:
    if m.fc3.out_features != m.fc1.in_features:
        return f"a transition from {m.fc1.in_features} to {m.fc3.out_features} channels"
    return first(affine(m.norm), without_bias((m.fc1, m.fc2, m.fc3)), width("transition", m.fc1.in_features))


_PAIR_TRACK = {"tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end", "transition_z"}
_SINGLE_TRACK = {"pre_norm_s", "attention", "transition_s", "s_post_norm"}


def _check_layer(m: Any) -> str:
    """Layers of other versions that have other parts do something else with them."""
    others = {name for name, _ in m.named_children()} ^ (_PAIR_TRACK | _SINGLE_TRACK)
    if not others or others == _SINGLE_TRACK:
        return ""
    return f"a layer of other parts than Boltz 2.2's: {', '.join(sorted(others))}"


def _check_pair_bias(m: Any) -> str:
    return head_size(m.proj_q.out_features, m.num_heads)


_LAYERS = "boltz.model.layers."
_TRIANGLE = f"{_LAYERS}triangular_attention.attention.TriangleAttention"
RECIPES = {
    f"{_LAYERS}triangular_mult.TriangleMultiplicationOutgoing": Recipe(
        "triangle_multiplication", Outgoing, _check_multiplication
    ),
    f"{_LAYERS}triangular_mult.TriangleMultiplicationIncoming": Recipe(
        "triangle_multiplication", Incoming, _check_multiplication
    ),
    _TRIANGLE: Recipe("triangle_attention", TriangleAttention, _check_attention),
    f"{_LAYERS}transition.Transition": Recipe("transition", Transition, _check_transition),
    f"{_LAYERS}attentionv2.AttentionPairBias": Recipe(
        "attention_pair_bias", AttentionPairBias, _check_pair_bias
    ),
    f"{_LAYERS}attention.AttentionPairBias": Recipe(
        "attention_pair_bias", FirstAttentionPairBias, _check_pair_bias
    ),
    f"{_LAYERS}pairformer.PairformerLayer": Recipe("gated_output", PairformerLayer, _check_layer),
    f"{_LAYERS}pairformer.PairformerNoSeqLayer": Recipe("gated_output", PairformerNoSeqLayer, _check_layer),
}
WITHOUT_OPERATOR = {
    f"{_LAYERS}outer_product_mean.OuterProductMean": "outer product mean",
    f"{_LAYERS}pair_averaging.PairWeightedAveraging": "pair-weighted averaging",
}
