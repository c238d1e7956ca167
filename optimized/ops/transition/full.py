"""The transition in float32: the library's products over runs of rows, with the hidden layer of one run at a time.

Without tensor cores a kernel that holds the hidden layer is bound by its registers and by shared memory: of 256 hidden
channels at 768 tokens it took 24 ms forward on an H200, where the products alone are 2.6 ms of the card's arithmetic.
As three TF32 products every tile that was tried spills. So the library multiplies; a run is short enough for the cache between products,
and nothing of it is kept.

Backward, given dy (n, a and b made again from x), with h = swish(a)·b:
    dh = dy·w_out;  db = dh·swish(a);  da = dh·b·swish'(a);  dn = da·w_a + db·w_b, then the layer-norm backward
    dw_a = daᵀ·n, dw_b = dbᵀ·n, dw_out = dyᵀ·h, summed run after run
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.parameters import gradient_dtype

RUN = 1 << 23
"""Values of a and b in one run: 32 MiB, about half the last-level cache of an H200."""


def _runs(rows: int, hidden: int) -> Iterator[slice]:
    length = max(1, RUN // (2 * hidden))
    return (slice(start, start + length) for start in range(0, rows, length))


def _prepared(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """γ, β, w_a over w_b `[2h, c]` and w_out `[c, h]` in float32."""
    gamma, beta, w_a, w_b, w_out = (p.float() for p in parameters)
    return gamma, beta, torch.cat((w_a, w_b)), w_out


def forward(x: Tensor, parameters: Sequence[Tensor], eps: float) -> Tensor:
    """y `[rows, c]` in float32 from x `[rows, c]`; `parameters` are γ, β, w_a, w_b, w_out."""
    gamma, beta, wide, w_out = _prepared(parameters)
    out = torch.empty_like(x, dtype=torch.float32)
    for run in _runs(x.shape[0], w_out.shape[1]):
        n = F.layer_norm(x[run].float(), gamma.shape, gamma, beta, eps)
        a, b = (n @ wide.T).chunk(2, -1)
        torch.mm(F.silu(a).mul_(b), w_out.T, out=out[run])
    return out


def backward(dy: Tensor, x: Tensor, parameters: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of γ, β, w_a, w_b, w_out one after another in one vector."""
    gamma, beta, wide, w_out = _prepared(parameters)
    dx = torch.empty_like(x)
    total: list[Tensor] = []
    for run in _runs(x.shape[0], w_out.shape[1]):
        rows, dy_run = x[run].float(), dy[run].float()
        n, mean, rstd = torch.native_layer_norm(rows, gamma.shape, gamma, beta, eps)
        d_ab = n @ wide.T
        a, b = d_ab.chunk(2, -1)
        swish, dh = F.silu(a), dy_run @ w_out
        d_out = dy_run.T @ (swish * b)
        b.mul_(dh)  # what dh brings to swish(a); b itself is not needed again
        torch.mul(dh, swish, out=swish)
        a.copy_(torch.ops.aten.silu_backward(b, a))
        b.copy_(swish)
        gradients = torch.ops.aten.native_layer_norm_backward(
            d_ab @ wide, rows, gamma.shape, mean, rstd, gamma, beta, (True, True, True)
        )
        dx[run] = gradients[0]
        sums = [*gradients[1:], d_ab.T @ n, d_out]
        total = [t.add_(s) for t, s in zip(total, sums, strict=True)] if total else sums
    flat = torch.cat([g.flatten() for g in total])
    return dx, flat.to(gradient_dtype(parameters))
