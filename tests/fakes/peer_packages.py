"""Stand-ins for packages that need a GPU: their documented conventions in plain PyTorch, and nothing more lenient."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    logits = torch.einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5 + bias
    return torch.softmax(logits.masked_fill(~keep, -1e9), dim=-1).to(v.dtype) @ v


def trifast() -> ModuleType:
    """q, k, v [b, h, n, n, d]; b [b, h, n, n]; mask [b, n, n], True = masked."""

    def triangle_attention(q: Tensor, k: Tensor, v: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        batch, heads, rows, tokens, _ = q.shape
        assert rows == tokens
        assert k.shape == v.shape == q.shape
        assert b.shape == (batch, heads, rows, tokens)
        assert b.dtype == q.dtype
        assert mask.shape == (batch, rows, tokens)
        assert mask.dtype == torch.bool
        return _softmax_attention(q, k, v, b[:, :, None], ~mask[:, None, :, None, :])

    return _module("trifast", triangle_attention)


def cuequivariance_ops() -> ModuleType:
    """The functions the cuEquivariance front end calls; alone, they also serve as the front end."""

    def triangle_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        return_aux: bool = False,
        *,
        kv_lengths: Tensor | None = None,
    ) -> Tensor:
        assert scale is None
        assert not return_aux
        assert kv_lengths is None
        batch, rows, heads, queries, _ = q.shape
        keys = k.shape[-2]
        assert bias.shape == (batch, 1, heads, queries, keys)
        assert bias.dtype == torch.float32
        if mask is None:
            mask = torch.ones(batch, rows, 1, 1, keys, dtype=torch.bool)
        assert mask.shape == (batch, rows, 1, 1, keys)
        return _softmax_attention(q, k, v, bias, mask)

    def triangle_multiplicative_update(
        x: Tensor,
        direction: str = "outgoing",
        mask: Tensor | None = None,
        norm_in_weight: Tensor | None = None,
        norm_in_bias: Tensor | None = None,
        p_in_weight: Tensor | None = None,
        p_in_bias: Tensor | None = None,
        g_in_weight: Tensor | None = None,
        g_in_bias: Tensor | None = None,
        norm_out_weight: Tensor | None = None,
        norm_out_bias: Tensor | None = None,
        p_out_weight: Tensor | None = None,
        p_out_bias: Tensor | None = None,
        g_out_weight: Tensor | None = None,
        g_out_bias: Tensor | None = None,
        eps: float = 1e-5,
        precision: object = None,
    ) -> Tensor:
        assert x.ndim == 4
        given = (norm_in_weight, norm_in_bias, p_in_weight, g_in_weight, norm_out_weight, norm_out_bias,
                 p_out_weight, g_out_weight)  # fmt: skip
        assert all(w is not None and w.dtype == x.dtype for w in given)
        assert all(b is None for b in (p_in_bias, g_in_bias, p_out_bias, g_out_bias))
        normed = F.layer_norm(x, x.shape[-1:], norm_in_weight, norm_in_bias, eps)
        both = torch.sigmoid(F.linear(normed, g_in_weight)) * F.linear(normed, p_in_weight)
        if mask is not None:
            assert mask.shape == x.shape[:3]
            both = both * mask[..., None]
        a, b = both.chunk(2, dim=-1)
        pattern = {"outgoing": "...ikc,...jkc->...ijc", "incoming": "...kic,...kjc->...ijc"}[direction]
        product = torch.einsum(pattern, a, b)
        normed_out = F.layer_norm(product, product.shape[-1:], norm_out_weight, norm_out_bias, eps)
        return F.linear(normed_out, p_out_weight) * torch.sigmoid(F.linear(normed, g_out_weight))

    def init_triton_cache() -> None:
        return None

    return _module(
        "cuequivariance_ops_torch", triangle_attention, triangle_multiplicative_update, init_triton_cache
    )


def _module(name: str, *functions: object) -> ModuleType:
    made = ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made
