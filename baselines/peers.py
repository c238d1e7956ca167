"""The operators of other packages, called as their documentation says: tensors in, tensors out.

Each function imports its package and returns the operator in the form of `biased_attention`: q [B, H, Q, d], k and
v [B, H, K, d], bias [H, Q, K] shared by the batch, and a mask [B, K] of keys to keep, or None. Layout, bias dtype
and mask convention of the package are made inside, because whoever calls it has to make them. The functions ending
in ``_limits`` say what a package does not take, or nothing.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from megafold_bench.outcomes import UnsupportedError

PACKAGES = {
    "cuequivariance": (
        "cuequivariance-torch",
        "cuequivariance-ops-torch-cu13",
        "cuequivariance-ops-torch-cu12",
    ),
    "trifast": ("trifast",),
    "ds4sci": ("deepspeed",),
}
"""Distributions whose versions are recorded with a peer."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PeerAttention(Protocol):
    """softmax(q kᵀ / √d + bias) v as somebody else computes it; shapes as in the module's docstring."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, H, Q, d]"""


class PeerTriangleMultiplication(Protocol):
    """Algorithm 12 or 13 from z [N, N, c], without the residual; mask [N, N] of pairs to keep, or None.

    `weights` with h hidden channels: ``norm_in_weight`` and ``norm_in_bias`` [c]; ``a_p`` and ``b_p``, the
    projections, ``a_g`` and ``b_g``, their gates, [h, c]; ``norm_out_weight`` and ``norm_out_bias`` [h]; ``out``
    [c, h] and its gate ``g`` [c, c].
    """

    def __call__(
        self, z: Tensor, weights: Mapping[str, Tensor], outgoing: bool, mask: Tensor | None = None
    ) -> Tensor:
        """[N, N, c]"""


@contextmanager
def importing() -> Iterator[None]:
    """Within it, whatever keeps a package from being imported becomes an `UnsupportedError` with the reason."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(f"not installed: {error}") from error
    except UnsupportedError:
        raise
    except (KeyError, OSError, RuntimeError) as error:  # what they raise without driver or compiler
        raise UnsupportedError(f"cannot be loaded: {type(error).__name__}: {error}") from error


def versions(name: str) -> dict[str, str]:
    """Installed versions of the packages behind a peer."""
    found = {}
    for package in PACKAGES.get(name, ()):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def prepare_environment() -> None:
    """Settings that keep peers from running something else than their kernels; before they are imported."""
    os.environ.setdefault("CUEQ_TRIATTN_FALLBACK_THRESHOLD", "0")
    os.environ.setdefault("CUEQ_TRIMUL_FALLBACK_THRESHOLD", "0")


def flex_attention() -> PeerAttention:
    """FlexAttention, to be compiled by the caller: bias and mask enter through `score_mod`, the bias with its gradient.

    The bias gradient is summed by atomics in float32, so it is not bitwise repeatable.
    """
    from torch.nn.attention.flex_attention import flex_attention as flex

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = bias.contiguous()  # read once for each entry of the batch, along the keys

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            biased = s + bias[h, i, j]
            return biased if mask is None else torch.where(mask[b, j], biased, -math.inf)

        out = flex(q, k, v, score_mod=score)
        assert isinstance(out, Tensor)
        return out

    return attend


def flex_limits(q: Tensor, k: Tensor) -> str:
    """FlexAttention's kernels begin at 16 channels per head."""
    width = q.shape[-1]
    return f"heads have at least 16 channels, not {width}" if width < 16 else ""


def trifast_attention() -> PeerAttention:
    """trifast: q `[1, H, N, N, d]`, bias `[1, H, N, N]` of q's dtype, mask `[1, N, N]` with True = masked."""
    from trifast import triangle_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        masked = q.new_zeros(1, *q.shape[2:4], dtype=torch.bool) if mask is None else ~mask[None]
        return triangle_attention(q, k, v, bias.to(q.dtype)[None], masked).squeeze(0).transpose(0, 1)

    return attend


def trifast_limits(q: Tensor, k: Tensor) -> str:
    """Square problems, and head sizes that are powers of two."""
    rows, _, queries, width = q.shape
    if not rows == queries == k.shape[2]:
        return f"as many rows as tokens, not {rows} rows of {queries} queries and {k.shape[2]} keys"
    if width < 16 or width & (width - 1):
        return f"head sizes are powers of two from 16, not {width}"
    return "" if q.dtype in _DTYPES else f"no {q.dtype}"


def cuequivariance_attention() -> PeerAttention:
    """cuEquivariance: q `[1, B, H, Q, d]`, bias `[1, 1, H, Q, K]` in float32 as it asks, mask `[1, B, 1, 1, K]`."""
    import cuequivariance_ops_torch  # noqa: F401  (the front end finds its kernels missing at the first call only)
    from cuequivariance_torch import triangle_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = None if mask is None else mask[None, :, None, None, :]
        out = triangle_attention(q[None], k[None], v[None], bias.float()[None, None], mask=keep)
        return out.view(q.shape)

    return attend


def cuequivariance_attention_limits(q: Tensor, k: Tensor) -> str:
    """Documented limits of the kernels; beyond them the package runs PyTorch without saying so."""
    width = q.shape[-1]
    if q.dtype == torch.float32:
        return "" if width <= 32 and width % 4 == 0 else f"float32 heads: multiples of 4 to 32, not {width}"
    if q.dtype not in _DTYPES:
        return f"no {q.dtype}"
    return "" if width <= 128 and width % 8 == 0 else f"16-bit heads: multiples of 8 to 128, not {width}"


def cuequivariance_triangle_multiplication() -> PeerTriangleMultiplication:
    """cuEquivariance's whole update: input maps stacked, the a rows before the b rows; weights in z's dtype.

    Its fastest kernels take z and weights in bfloat16 only, and that is what the projections of a bfloat16 z
    compute with under autocast anyway.
    """
    import cuequivariance_ops_torch  # noqa: F401
    from cuequivariance_torch import triangle_multiplicative_update

    def update(
        z: Tensor, weights: Mapping[str, Tensor], outgoing: bool, mask: Tensor | None = None
    ) -> Tensor:
        w = {name: weight.to(z.dtype) for name, weight in weights.items()}
        out = triangle_multiplicative_update(
            z[None],
            direction="outgoing" if outgoing else "incoming",
            mask=None if mask is None else mask[None].to(z.dtype),
            norm_in_weight=w["norm_in_weight"],
            norm_in_bias=w["norm_in_bias"],
            p_in_weight=torch.cat([w["a_p"], w["b_p"]]),
            g_in_weight=torch.cat([w["a_g"], w["b_g"]]),
            norm_out_weight=w["norm_out_weight"],
            norm_out_bias=w["norm_out_bias"],
            p_out_weight=w["out"],
            g_out_weight=w["g"],
        )
        return out.view(z.shape)

    return update


def prepare_cuequivariance_compilation() -> None:
    """Load the tuning tables of cuEquivariance, which its documentation wants done before ``torch.compile``."""
    import cuequivariance_ops_torch

    cuequivariance_ops_torch.init_triton_cache()


def cuequivariance_triangle_limits(z: Tensor, hidden: int) -> str:
    """Documented limits of the kernels, for z [N, N, c] and `hidden` channels."""
    wrong = [c for c in (z.shape[-1], hidden) if c % 32]
    if wrong:
        return f"channels are multiples of 32, not {wrong[0]}"
    return "" if z.dtype in _DTYPES else f"no {z.dtype}"
