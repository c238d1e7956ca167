"""Other people's attention and triangle multiplication as functions of a problem; `baselines.peers` knows the calls.

Layouts with R rows, N tokens, H heads of D channels: inputs here are `[R, N, H, D]`, bias `[H, N, N]`, mask `[R, N]`
boolean with True = keep.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines import peers
from baselines.peers import PeerAttention
from megafold_bench.outcomes import UnsupportedError
from optimized.kernels.problem import Function, Problem, Tensors


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


def _attention(attend: PeerAttention) -> Function:
    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        q, k, v = (t[name].transpose(1, 2) for name in ("q", "k", "v"))
        return [attend(q, k, v, t["bias"], mask).transpose(1, 2)]

    return run


def _require(reason: str) -> None:
    if reason:
        raise UnsupportedError(reason)


def _heads_first(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.tensors["q"].transpose(1, 2), problem.tensors["k"].transpose(1, 2)


def flex(problem: Problem) -> Function:
    """FlexAttention, compiled for each length."""
    if problem.tensors["q"].device.type != "cuda":
        raise UnsupportedError("FlexAttention's compiled backward pass needs a GPU")
    _require(peers.flex_limits(*_heads_first(problem)))
    return torch.compile(_attention(peers.flex_attention()), dynamic=False)


def cuequivariance_attention(problem: Problem) -> Function:
    """cuEquivariance's triangle attention."""
    _require(peers.cuequivariance_attention_limits(*_heads_first(problem)))
    return _attention(peers.cuequivariance_attention())


def cuequivariance_triangle(problem: Problem) -> Function:
    """cuEquivariance's whole triangle multiplication."""
    _require(peers.cuequivariance_triangle_limits(problem.tensors["z"], problem.tensors["a_p"].shape[0]))
    update = peers.cuequivariance_triangle_multiplication()
    outgoing = bool(problem.settings["outgoing"])

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = {name: tensor for name, tensor in t.items() if name != "z"}
        return [update(t["z"], weights, outgoing, mask)]

    return run


def trifast(problem: Problem) -> Function:
    """trifast's triangle attention."""
    _require(peers.trifast_limits(*_heads_first(problem)))
    return _attention(peers.trifast_attention())


def ds4sci(problem: Problem) -> Function:
    """DeepSpeed's evoformer attention: q `[1, R, N, H, D]`, additive mask `[1, R, 1, 1, N]`, bias `[1, 1, H, N, N]`."""
    if _dtype(problem) == torch.float32:
        raise UnsupportedError("DS4Sci takes bf16 and fp16 only")
    _, tokens, _, width = problem.tensors["q"].shape
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
        return [attend(q, k, v, [additive, t["bias"][None, None]]).squeeze(0)]

    return run
