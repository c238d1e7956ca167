"""LayerNorm, linear layers and their initialisation, transitions, shared dropout, adaptive LayerNorm."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Init = Literal["lecun", "relu", "zero", "adaptive_gate"]

# Standard deviation of a unit normal truncated at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


def _autocast_type(x: Tensor) -> str:
    # Autocast knows no meta device; there, nothing is computed and the CPU's setting serves.
    return "cpu" if x.device.type == "meta" else x.device.type


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which products on `x`'s device run in the dtype of their operands."""
    return torch.autocast(_autocast_type(x), enabled=False)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype a matrix product with `parameter` runs in: autocast's where it is on, else its own."""
    device_type = _autocast_type(parameter)
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return parameter.dtype


def to_module_dtype(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` as a module with `parameter` can take it.

    Under autocast any floating type will do. Without it, a bfloat16 trunk output entering a float32
    module (the diffusion module of the faithful precision policy) has to be cast.
    """
    if torch.is_autocast_enabled(_autocast_type(x)):
        return x
    return x.to(parameter.dtype)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot of `index` along a new last dimension of `classes`, all zero where out of range.

    By comparison, because `torch.nn.functional.one_hot` makes int64 and waits for the device.
    """
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).to(dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, statistics in float32, output in the input's dtype.

    Autocast would return float32 and double the memory of everything downstream, so the affine
    parameters are cast to the input's dtype instead. ``scale`` and ``offset`` say which exist.
    """

    def __init__(self, c: int, *, scale: bool = True, offset: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.c = c
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(c)) if scale else None
        self.bias = nn.Parameter(torch.zeros(c)) if offset else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., c]."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not torch.is_autocast_enabled(_autocast_type(x)):
            return F.layer_norm(x, (self.c,), weight, bias, self.eps)
        with without_autocast(x):
            return F.layer_norm(x, (self.c,), weight, bias, self.eps)

    def extra_repr(self) -> str:
        """For printing."""
        return f"{self.c}, scale={self.weight is not None}, offset={self.bias is not None}"


class Linear(nn.Linear):
    """Linear layer, without bias unless asked, initialised as AlphaFold 3 does.

    ``init``: ``lecun`` (variance 1/fan-in), ``relu`` (2/fan-in), ``zero`` (output projections and gates)
    or ``adaptive_gate`` (weight 0, bias -2: an adaptive gate that starts at about 0.1). The first two
    are normals truncated at two standard deviations. ``precise`` keeps the product out of autocast, in
    the weight's dtype: for inputs and outputs in Å, which bfloat16 would round to half an Ångström.
    """

    def __init__(
        self, c_in: int, c_out: int, *, bias: bool = False, init: Init = "lecun", precise: bool = False
    ) -> None:
        self.init = init  # before the base class, whose constructor initialises
        self.precise = precise
        super().__init__(c_in, c_out, bias=bias)

    def reset_parameters(self) -> None:
        """Initialise from the default generator."""
        if self.init in ("lecun", "relu"):
            variance = (2.0 if self.init == "relu" else 1.0) / self.in_features
            std = math.sqrt(variance) / _TRUNCATED_STD
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, -2.0 if self.init == "adaptive_gate" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., c_in] to [..., c_out]."""
        if not self.precise:
            return super().forward(x)
        with without_autocast(x):
            return super().forward(x.to(self.weight.dtype))


class Transition(nn.Module):
    """SwiGLU transition (Alg 11): x -> W_out(silu(W_a LN x) * W_b LN x), hidden width n·c."""

    def __init__(self, c: int, n: int) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(c)
        self.linear_a = Linear(c, n * c, init="relu")
        self.linear_b = Linear(c, n * c, init="relu")
        self.linear_out = Linear(n * c, c, init="zero")

    def forward(self, x: Tensor) -> Tensor:
        """The update of [..., c], without the residual."""
        x = self.layer_norm(x)
        return self.linear_out(F.silu(self.linear_a(x)) * self.linear_b(x))


class SharedDropout(nn.Module):
    """Dropout with one mask for all positions along dimension `shared`.

    -3 shares over rows (AlphaFold's row-wise dropout), -2 over columns (column-wise).
    """

    def __init__(self, p: float, shared: Literal[-3, -2]) -> None:
        super().__init__()
        self.p = p
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """Dropped-out [..., N, N, c]; `x` itself in evaluation or with p = 0."""
        if not self.training or self.p == 0.0:
            return x
        shape = list(x.shape)
        shape[self.shared] = 1
        return x * F.dropout(x.new_ones(shape), self.p)


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm of `a` whose scale and offset are computed from a conditioning `s` (Alg 26)."""

    def __init__(self, c_a: int, c_s: int) -> None:
        super().__init__()
        self.layer_norm_a = LayerNorm(c_a, scale=False, offset=False)
        self.layer_norm_s = LayerNorm(c_s, offset=False)
        self.linear_scale = Linear(c_s, c_a, bias=True, init="zero")
        self.linear_shift = Linear(c_s, c_a, init="zero")

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """[..., N, c_a] from a of that shape and s [..., N, c_s], broadcast over leading dimensions."""
        s = self.layer_norm_s(s)
        return torch.sigmoid(self.linear_scale(s)) * self.layer_norm_a(a) + self.linear_shift(s)


class ConditionedTransition(nn.Module):
    """SwiGLU transition with adaptive LayerNorm and adaptive output gate (Alg 25)."""

    def __init__(self, c_a: int, c_s: int, n: int) -> None:
        super().__init__()
        self.ada_ln = AdaptiveLayerNorm(c_a, c_s)
        self.linear_a = Linear(c_a, n * c_a, init="relu")
        self.linear_b = Linear(c_a, n * c_a, init="relu")
        self.linear_out = Linear(n * c_a, c_a)
        self.linear_s = Linear(c_s, c_a, bias=True, init="adaptive_gate")

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """The update of a [..., N, c_a] given s [..., N, c_s], without the residual."""
        a = self.ada_ln(a, s)
        hidden = F.silu(self.linear_a(a)) * self.linear_b(a)
        return torch.sigmoid(self.linear_s(s)) * self.linear_out(hidden)
