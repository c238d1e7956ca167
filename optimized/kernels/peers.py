"""Other people's attention and triangle multiplication, called as their documentation says.

Layouts with R rows, N tokens, H heads of D channels: inputs here are `[R, N, H, D]`, bias `[H, N, N]`, mask `[R, N]`
boolean with True = keep.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megafold_bench.outcomes import UnsupportedError
from optimized.kernels.problems import Function, Problem, Tensors


def _shape(problem: Problem) -> tuple[int, int, int, int]:
    rows, tokens, heads, width = problem.tensors["q"].shape
    return rows, tokens, heads, width


def _dtype(problem: Problem) -> torch.dtype:
    return next(iter(problem.tensors.values())).dtype


def sdpa(problem: Problem) -> Function:
    """PyTorch's scaled_dot_product_attention: bias and mask become one additive tensor `[R, H, N, N]`."""

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        q, k, v = (t[name].transpose(1, 2) for name in ("q", "k", "v"))
        bias = t["bias"][None].expand(q.shape[0], -1, -1, -1)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], -math.inf)
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)]

    return run


def flex(problem: Problem) -> Function:
    """FlexAttention, compiled for each length; bias and mask enter through `score_mod`, the bias with its gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    if problem.tensors["q"].device.type != "cuda":
        raise UnsupportedError("FlexAttention's compiled backward pass needs a GPU")

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        bias = t["bias"]

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            biased = s + bias[h, i, j]
            return biased if mask is None else torch.where(mask[b, j], biased, -math.inf)

        q, k, v = (t[name].transpose(1, 2) for name in ("q", "k", "v"))
        return [flex_attention(q, k, v, score_mod=score).transpose(1, 2)]

    return torch.compile(run, dynamic=False)


def cuequivariance_attention(problem: Problem) -> Function:
    """cuEquivariance: q `[1, R, H, N, D]`, bias `[1, 1, H, N, N]` in fp32 as it asks, mask `[1, R, 1, 1, N]`."""
    import cuequivariance_ops_torch  # noqa: F401  (without it the front end runs plain PyTorch)
    from cuequivariance_torch import triangle_attention

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        q, k, v = (t[name].transpose(1, 2)[None] for name in ("q", "k", "v"))
        keep = None if mask is None else mask[None, :, None, None, :]
        out = triangle_attention(q, k, v, t["bias"].float()[None, None], mask=keep)
        return [out.view(q.shape)[0].transpose(1, 2)]

    return run


def cuequivariance_triangle(problem: Problem) -> Function:
    """cuEquivariance's whole triangle multiplication: input maps stacked, the a rows before the b rows."""
    import cuequivariance_ops_torch  # noqa: F401
    from cuequivariance_torch import triangle_multiplicative_update

    direction = "outgoing" if problem.settings["outgoing"] else "incoming"

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        out = triangle_multiplicative_update(
            t["z"][None],
            direction=direction,
            mask=None if mask is None else mask[None].to(t["z"].dtype),
            norm_in_weight=t["norm_in_weight"],
            norm_in_bias=t["norm_in_bias"],
            p_in_weight=torch.cat([t["a_p"], t["b_p"]]),
            g_in_weight=torch.cat([t["a_g"], t["b_g"]]),
            norm_out_weight=t["norm_out_weight"],
            norm_out_bias=t["norm_out_bias"],
            p_out_weight=t["out"],
            g_out_weight=t["g"],
        )
        return [out.view(t["z"].shape)]

    return run


def trifast(problem: Problem) -> Function:
    """trifast: q `[1, H, N, N, D]`, bias `[1, H, N, N]`, mask `[1, N, N]` with True = masked."""
    rows, tokens, _, width = _shape(problem)
    if rows != tokens:
        raise UnsupportedError(f"trifast takes as many rows as tokens, not {rows} rows of {tokens}")
    if width < 16 or width & (width - 1):
        raise UnsupportedError(f"trifast takes head sizes that are powers of two from 16, not {width}")
    from trifast import triangle_attention

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        q, k, v = (t[name].permute(2, 0, 1, 3)[None].contiguous() for name in ("q", "k", "v"))
        masked = q.new_zeros(q.shape[:1] + q.shape[2:4], dtype=torch.bool) if mask is None else ~mask[None]
        return [triangle_attention(q, k, v, t["bias"][None], masked)[0].permute(1, 2, 0, 3)]

    return run


def ds4sci(problem: Problem) -> Function:
    """DeepSpeed's evoformer attention: q `[1, R, N, H, D]`, additive mask `[1, R, 1, 1, N]`, bias `[1, 1, H, N, N]`."""
    if _dtype(problem) == torch.float32:
        raise UnsupportedError("DS4Sci takes bf16 and fp16 only")
    _, tokens, _, width = _shape(problem)
    if tokens <= 16 or width > 64:
        raise UnsupportedError(
            f"DS4Sci takes more than 16 tokens and heads up to 64, not {tokens} and {width}"
        )
    from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

    attend: Any = DS4Sci_EvoformerAttention

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        q, k, v = (t[name][None] for name in ("q", "k", "v"))
        rows, count = q.shape[1:3]
        additive = q.new_zeros(1, rows, 1, 1, count)
        if mask is not None:
            additive = additive.masked_fill(~mask[None, :, None, None, :], -1e4)
        return [attend(q, k, v, [additive, t["bias"][None, None]])[0]]

    return run
