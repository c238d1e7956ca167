"""Comparison of an operator with its definition: errors against fp64, and repeatability."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FP32_FLOOR = 2e-6


def gradients(
    fn: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Outputs, then the gradients of every tensor, with all of them cast to `dtype` first where it is given."""
    leaves = [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
    outputs = fn(*leaves)
    grads = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, grads))


def distance(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in fp64."""
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def check_against_definition(
    fn: Callable[..., list[Tensor]],
    definition: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    """Error against fp64 at most 1.1 × the definition's in the same dtype, for outputs and all gradients."""
    ours = gradients(fn, tensors, grads, None)
    eager = gradients(definition, tensors, grads, None)
    exact = gradients(definition, tensors, grads, torch.float64)
    for index, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert a.shape == x.shape and a.dtype == e.dtype, f"result {index}: {a.shape} {a.dtype}"
        error, allowed = distance(a, x), max(1.1 * distance(e, x), FP32_FLOOR)
        assert error <= allowed, f"result {index}: error {error:.3e}, allowed {allowed:.3e}"


def check_bitwise(
    fn: Callable[..., list[Tensor]], tensors: Sequence[Tensor], grads: Sequence[Tensor], times: int
) -> None:
    """The same inputs give the same bits every time."""
    first = gradients(fn, tensors, grads, None)
    for _ in range(times - 1):
        again = gradients(fn, tensors, grads, None)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Random weights: `[h, c]` scaled by 1/√c; a vector pair γ ≈ 1, β ≈ 0 for every pair of one-dimensional shapes."""
    result, scale_next = [], True
    for shape in shapes:
        if len(shape) == 1:
            value = 1 + 0.2 * torch.randn(shape) if scale_next else 0.1 * torch.randn(shape)
            scale_next = not scale_next
        else:
            value = torch.randn(shape) / shape[-1] ** 0.5
        result.append(value.to(device=device, dtype=dtype))
    return result
