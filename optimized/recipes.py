"""How one class of modules is replaced: which operator, which forward, and what it must look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from baselines.fallbacks import Fallbacks as Notes
from optimized.ops.adaptive_layer_norm import op as adaptive_layer_norm_op
from optimized.ops.attention.operator import HEAD_DIMS, PRECISIONS
from optimized.ops.layer_norm_linear import op as layer_norm_linear_op
from optimized.ops.outer_product_mean import op as outer_product_mean_op
from optimized.ops.pair_weighted_averaging.op import WIDTHS
from optimized.ops.support import Supported
from optimized.ops.transition import op as transition_op
from optimized.ops.triangle_multiplication import op as triangle_multiplication_op

OPS = (
    "triangle_multiplication",
    "triangle_attention",
    "transition",
    "attention_pair_bias",
    "layer_norm_linear",
    "adaptive_layer_norm",
    "conditioned_transition",
    "gated_output",
    "outer_product_mean",
    "pair_weighted_averaging",
    "linear",
)
"""The operators that can be switched one by one."""

DEFAULT_OPS = (
    "triangle_multiplication",
    "triangle_attention",
    "transition",
    "attention_pair_bias",
    "layer_norm_linear",
    "gated_output",
    "outer_product_mean",
    "pair_weighted_averaging",
)
"""What `apply` uses unless asked otherwise: the operators of pair, single and MSA representation.

Those of the diffusion module besides (`adaptive_layer_norm`, `conditioned_transition`, `linear`) agree with their
definitions too. On an H200 they took 2 to 4 % off a step whose denoiser is replayed from graphs; where the host launches
it, they cost the host more than they save the GPU.
"""

PRODUCTS = "tf32x3"
"""How products of float32 are taken unless asked otherwise.

On an H200 with smaller errors than eager PyTorch's, but for the bias gradient, where `ieee` is no better.
"""


class Fallbacks(Notes):
    """Calls that ran a definition instead of a kernel."""

    def check(self, op: str, verdict: Supported) -> None:
        """Count the call unless a kernel takes it."""
        if not verdict.ok:
            self.note(op, verdict.reason)


class Fused:
    """Mixin of every replacement. `fallbacks` collects why its operators fell back, if they did.

    `fused_ops` are the operators that were asked for: a module that is replaced for one may end with another.
    `products` is how attention with pair bias and linear layers take products of float32.
    """

    whole = True
    """Whether this takes the place of the modules inside too, which are then not called."""
    fallbacks: Fallbacks
    fused_ops: frozenset[str] = frozenset(OPS)
    products: str = PRODUCTS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fallbacks = Fallbacks()


@dataclass(frozen=True)
class Recipe:
    """The replacement of one class: `mixin` overrides its forward; `check` says what does not fit, or nothing.

    `products`: the kinds of products for which there is something to replace, without which it is passed over.
    `basic`: a class that most modules are made of, passed over, too, unless its operator was asked for.
    """

    op: str
    mixin: type[Fused]
    check: Callable[[Any], str]
    products: tuple[str, ...] = PRECISIONS
    basic: bool = False

    def concerns(self, chosen: frozenset[str], products: str) -> bool:
        """Whether these operators and products mean this class at all."""
        return products in self.products and (self.op in chosen or not self.basic)


def fused_class(mixin: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    """`original` with the forward of `mixin`: same parameters, same constructor, an instance of both.

    The same class for the same arguments, so that compiled functions guarded by class are compiled once.
    """
    derive: Any = _derive
    return mixin if issubclass(mixin, original) else derive(mixin, original)


@cache
def _derive(mixin: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    def reduce(self: nn.Module) -> tuple[Any, ...]:
        return _revive, (mixin, original), dict(self.__dict__)

    body = {"__module__": mixin.__module__, "__reduce__": reduce, "__doc__": mixin.__doc__}
    metaclass: Any = type(original)
    return metaclass(f"Fused{original.__name__}", (mixin, original), body)


def _revive(mixin: type[Fused], original: type[nn.Module]) -> nn.Module:
    """An empty instance, for copying and unpickling: the class has no name that could be imported."""
    made = fused_class(mixin, original)
    return made.__new__(made)


def affine(*norms: Any) -> str:
    """What keeps these layer norms out of the operators: they need scale, offset and the same epsilon."""
    if any(n.weight is None or n.bias is None for n in norms):
        return "a layer norm without scale or offset"
    eps = {n.eps for n in norms}
    return "" if len(eps) == 1 else f"layer norms with different eps: {', '.join(map(str, sorted(eps)))}"


def adaptive(norm_a: Any, norm_s: Any) -> str:
    """What keeps the norms of an adaptive layer norm out of the operators: they need one scale, that of s."""
    if norm_a.weight is not None or norm_a.bias is not None:
        return "an adaptive layer norm whose norm of a has parameters of its own"
    if norm_s.weight is None or norm_s.bias is not None:
        return "an adaptive layer norm whose norm of s has no scale, or an offset"
    if norm_a.eps != norm_s.eps:
        return f"layer norms with different eps: {norm_a.eps}, {norm_s.eps}"
    return ""


def without_bias(linears: Iterable[Any]) -> str:
    """What keeps these projections out of the operators: a bias."""
    return "a projection with a bias" if any(p.bias is not None for p in linears) else ""


def head_size(channels: int, heads: int) -> str:
    """Whether the attention kernels know this head size."""
    size = channels // heads
    return "" if size in HEAD_DIMS else f"head size {size} is not one of {', '.join(map(str, HEAD_DIMS))}"


def averaging_size(channels: int, heads: int) -> str:
    """Whether the averaging kernels know this number of channels per head."""
    size = channels // heads
    return "" if size in WIDTHS else f"{size} channels per head, not one of {', '.join(map(str, WIDTHS))}"


def width(op: str, channels: int) -> str:
    """Whether the kernels of `op` hold this many channels."""
    limits = {
        "triangle_multiplication": triangle_multiplication_op.MAX_CHANNELS,
        "triangle_attention": layer_norm_linear_op.MAX_CHANNELS,
        "layer_norm_linear": layer_norm_linear_op.MAX_CHANNELS,
        "transition": transition_op.MAX_CHANNELS,
        "adaptive_layer_norm": adaptive_layer_norm_op.MAX_CHANNELS,
        "outer_product_mean": outer_product_mean_op.MAX_CHANNELS,
    }
    return "" if channels <= limits[op] else f"{channels} channels; the kernels hold at most {limits[op]}"


def first(*reasons: str) -> str:
    """The first reason that is not empty."""
    return next((reason for reason in reasons if reason), "")
