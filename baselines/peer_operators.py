"""Operators of other packages in a built baseline: put there from outside, with every weight where it was.

Only the named operators change; projections, gates, masks, dropout and residuals stay the model's own. A call that
an operator does not take runs what the module ran before, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines import peers
from baselines.af3.attention import AttentionFunction, biased_attention
from baselines.af3.attention_pair_bias import AttentionPairBias
from baselines.af3.config import Attention
from baselines.af3.triangle import TriangleAttention, TriangleMultiplication
from baselines.fallbacks import Fallbacks
from baselines.peers import PeerAttention, PeerTriangleMultiplication

TRIANGLE_ATTENTION = "triangle_attention"
ATTENTION_PAIR_BIAS = "attention_pair_bias"
TRIANGLE_MULTIPLICATION = "triangle_multiplication"


@dataclass(frozen=True)
class OperatorReport:
    """What was replaced, for the record; `fallbacks` goes on counting while the model runs."""

    replaced: dict[str, int]
    """Operator to number of modules that run on it."""
    fallbacks: Fallbacks
    """The calls that ran the module's own operator instead, and why."""
    versions: dict[str, str]
    """Installed versions of the packages."""

    def summary(self) -> dict[str, Any]:
        """The above, JSON-serialisable."""
        return {"replaced": self.replaced, "fallbacks": self.fallbacks.counts, "versions": self.versions}


@dataclass(frozen=True)
class LimitedAttention:
    """An attention for `biased_attention`: `function` where `limits` has no objection, else `otherwise`."""

    op: str
    function: PeerAttention
    limits: Callable[[Tensor, Tensor], str]
    otherwise: Attention
    fallbacks: Fallbacks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """As `biased_attention`."""
        reason = self.limits(q, k)
        if reason:
            self.fallbacks.note(self.op, reason)
            return biased_attention(q, k, v, bias, self.otherwise)
        return self.function(q, k, v, bias)


class PeerTriangleUpdate(TriangleMultiplication):
    """Triangle multiplication (Alg 12, 13) through somebody else's operator."""

    update: PeerTriangleMultiplication
    fallbacks: Fallbacks

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `TriangleMultiplication`: z [N, N, c_z], `mask` [N] tokens to keep."""
        hidden = self.linear_a_p.weight.shape[0]
        reason = peers.cuequivariance_triangle_limits(z, hidden)
        if reason:
            self.fallbacks.note(TRIANGLE_MULTIPLICATION, reason)
            return super().forward(z, mask)
        pairs = None if mask is None else mask[:, None] & mask[None, :]
        return self.update(z, self._weights(), self.outgoing, pairs)

    def _weights(self) -> dict[str, Tensor]:
        """The parameters under the names that `baselines.peers` uses."""
        return {
            "norm_in_weight": _given(self.layer_norm_in.weight),
            "norm_in_bias": _given(self.layer_norm_in.bias),
            "a_p": self.linear_a_p.weight,
            "b_p": self.linear_b_p.weight,
            "a_g": self.linear_a_g.weight,
            "b_g": self.linear_b_g.weight,
            "norm_out_weight": _given(self.layer_norm_out.weight),
            "norm_out_bias": _given(self.layer_norm_out.bias),
            "out": self.linear_z.weight,
            "g": self.linear_g.weight,
        }


def _given(parameter: nn.Parameter | None) -> Tensor:
    assert parameter is not None, "the norms of a triangle multiplication have scale and offset"
    return parameter


def use_flex(model: nn.Module, attention: Attention, compiled: bool) -> OperatorReport:
    """FlexAttention in every triangle attention and attention with pair bias of `model`, in place.

    `attention` is what the model runs where it does not fit. With `compiled` the operator alone is compiled;
    without, whoever compiles the block compiles it too. The windowed atom attention stays as it is.
    """
    attend: Callable[..., Tensor] = peers.flex_attention()
    if compiled:
        attend = torch.compile(attend, fullgraph=True, dynamic=False)
    log = Fallbacks()
    replaced: Counter[str] = Counter()
    for kind, op in ((TriangleAttention, TRIANGLE_ATTENTION), (AttentionPairBias, ATTENTION_PAIR_BIAS)):
        limited = LimitedAttention(op, attend, peers.flex_limits, attention, log)
        replaced[op] = _set_attention(model.modules(), kind, limited)
    return OperatorReport(dict(replaced), log, {})


def use_trifast(model: nn.Module, attention: Attention) -> OperatorReport:
    """trifast in every triangle attention of `model`, in place; `attention` where it does not fit.

    Raises `UnsupportedError` if the package cannot be loaded.
    """
    with peers.importing():
        attend = peers.trifast_attention()
    log = Fallbacks()
    limited = LimitedAttention(TRIANGLE_ATTENTION, attend, peers.trifast_limits, attention, log)
    count = _set_attention(model.modules(), TriangleAttention, limited)
    return OperatorReport({TRIANGLE_ATTENTION: count}, log, peers.versions("trifast"))


def use_cuequivariance(model: nn.Module, attention: Attention, opaque: bool = False) -> OperatorReport:
    """cuEquivariance in every triangle attention and triangle multiplication of `model`, in place.

    `attention` is what runs where its attention does not fit. An `opaque` operator is kept out of compiled code:
    each call is a graph break. Raises `UnsupportedError` if the package or its kernels cannot be loaded.
    """
    peers.prepare_environment()
    with peers.importing():
        attend = peers.cuequivariance_attention()
        update = peers.cuequivariance_triangle_multiplication()
    if opaque:
        attend, update = torch.compiler.disable(attend), torch.compiler.disable(update)
    log = Fallbacks()
    limited = LimitedAttention(
        TRIANGLE_ATTENTION, attend, peers.cuequivariance_attention_limits, attention, log
    )
    replaced = {
        TRIANGLE_ATTENTION: _set_attention(model.modules(), TriangleAttention, limited),
        TRIANGLE_MULTIPLICATION: 0,
    }
    for module in model.modules():
        if type(module) is TriangleMultiplication:
            module.__class__ = PeerTriangleUpdate
            module.__dict__["update"] = update
            module.__dict__["fallbacks"] = log
            replaced[TRIANGLE_MULTIPLICATION] += 1
    return OperatorReport(replaced, log, peers.versions("cuequivariance"))


def _set_attention(modules: Iterable[nn.Module], kind: type[nn.Module], function: AttentionFunction) -> int:
    """Make every module of class `kind` attend with `function`; their number."""
    count = 0
    for module in modules:
        if type(module) is kind:
            module.__dict__["attention"] = function
            count += 1
    return count
