"""Random cases of attention with a shared pair bias, and their errors against fp64."""

from dataclasses import dataclass

import torch

from optimized.ops.attention import attention, reference, supported

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("o", "dq", "dk", "dv", "dbias")
FP32_ROUNDINGS = 6 * 2.0**-24


@dataclass
class Case:
    """fp64 values rounded to a dtype, so that every implementation gets the same numbers."""

    leaves: list[torch.Tensor]
    do: torch.Tensor
    mask: torch.Tensor | None


def make(
    dtype, rows=3, heads=2, queries=19, keys=37, dim=16, masked=True, batch=(1,), seed=0, layout="token"
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def tensor(length):
        if layout == "head":
            return torch.randn(*batch, rows, heads, length, dim, generator=g).to(dtype)
        if layout == "fused":  # q, k or v as a slice of one projection of width 3 * heads * dim
            x = torch.randn(*batch, rows, length, 3 * heads * dim, generator=g).to(dtype)
            return x[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim)).transpose(-2, -3)
        if layout == "column":  # ending node: tokens slower than rows
            x = torch.randn(*batch, length, rows, heads, dim, generator=g).to(dtype)
            return x.movedim(-4, -2)
        return torch.randn(*batch, rows, length, heads, dim, generator=g).to(dtype).transpose(-2, -3)

    q, k, v, do = tensor(queries), tensor(keys), tensor(keys), tensor(queries)
    bias = torch.randn(*batch, 1, heads, queries, keys, generator=g).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(*batch, rows, keys, generator=g) > 0.3
        mask[..., 0, :] = False
    return Case([q, k, v, bias], do, mask)


def with_grads(f, case: Case, dtype) -> list[torch.Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in case.leaves]
    o = f(*leaves, case.mask)
    return [o.detach(), *torch.autograd.grad(o, leaves, case.do.to(dtype))]


def relative(a, b) -> float:
    return float((a.double() - b).norm() / b.norm())


def check(case: Case, dtype, factor: float = 1.1) -> None:
    """Errors against fp64 at most `factor` times those of the eager definition, or a few roundings in fp32."""
    assert supported(*case.leaves, case.mask) == (True, "")
    exact = with_grads(reference.attention, case, torch.float64)
    eager = with_grads(reference.attention, case, dtype)
    ours = with_grads(attention, case, dtype)
    floor = FP32_ROUNDINGS if dtype == torch.float32 else 0.0
    for name, a, e, x in zip(NAMES, ours, eager, exact, strict=True):
        assert a.dtype == dtype and a.shape == x.shape, name
        assert relative(a, x) <= max(factor * relative(e, x), floor), (name, relative(a, x), relative(e, x))
