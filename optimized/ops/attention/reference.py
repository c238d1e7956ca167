"""Attention with a pair bias shared by all rows: the definition, in plain PyTorch."""

import torch
from torch import Tensor


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every row over its keys, with one bias for all rows (AF3 algorithms 14, 15 and 24).

    q [*, R, H, Q, D]; k, v [*, R, H, K, D]; bias [*, 1, H, Q, K]; mask [*, R, K] boolean, True = keep.
    `scale` defaults to D ** -0.5. Returns o [*, R, H, Q, D] in the dtype of q and the natural log-sum-exp of the
    scores [*, R, H, Q] in fp32 (fp64 for fp64 inputs). The softmax is taken in that dtype. A row without a kept
    key has zero output, zero gradients and log-sum-exp -inf.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * factor) @ k.transpose(-1, -2) + bias.to(q.dtype)
    scores = scores.to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    finite = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
    weights = torch.exp(scores - finite[..., None])
    return (weights.to(v.dtype) @ v).to(q.dtype), lse


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The output of `attention_with_lse`."""
    return attention_with_lse(q, k, v, bias, mask, scale)[0]


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dbias) of `attention` for the output gradient `do`, written out.

    With p = exp(s - lse) and delta = sum_d do * o - dlse:  dv = p^T do,  ds = p * (do v^T - delta),  dq = scale * ds k,
    dk = scale * ds^T q,  dbias = sum over rows of ds. dbias is in the dtype of bias, the others in that of q.
    The products are taken in fp32 (fp64 for fp64 inputs).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    qw, kw, vw, dow = q.to(wide), k.to(wide), v.to(wide), do.to(wide)
    scores = factor * (qw @ kw.transpose(-1, -2)) + bias.to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, None, :], float("-inf"))
    lse = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse).to(wide)
    p = torch.exp(scores - lse[..., None])
    delta = (dow * o.to(wide)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(wide)[..., None]
    ds = p * (dow @ vw.transpose(-1, -2) - delta)
    dq = (factor * (ds @ kw)).to(q.dtype)
    dk = (factor * (ds.transpose(-1, -2) @ qw)).to(k.dtype)
    dv = (p.transpose(-1, -2) @ dow).to(v.dtype)
    return dq, dk, dv, ds.sum(-4, keepdim=True).to(bias.dtype)
