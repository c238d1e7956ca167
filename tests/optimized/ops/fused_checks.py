"""Comparison of an operator with its definition: errors against fp64, and repeatability."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FP32_FLOOR = 2e-6
DRAWS = 16


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
    """Error against fp64 at most 1.1 × the definition's in the same dtype, for outputs and all gradients.

    The norm of n rounding errors varies by 1/√(2n) from draw to draw, 9 % for the 64 of a LayerNorm's bias: a result
    beyond the limit is judged again over `DRAWS` output gradients, by the root mean square of its errors.
    """
    results = [_errors(fn, definition, tensors, grads)]
    if not all(_allowed(*pair) for pair in results[0]):
        for _ in range(DRAWS - 1):
            drawn = [torch.randn_like(g) * g.float().std().to(g.dtype) for g in grads]
            results.append(_errors(fn, definition, tensors, drawn))
    for index, draws in enumerate(zip(*results, strict=True)):
        error, eager = (sum(value**2 for value in side) ** 0.5 for side in zip(*draws, strict=True))
        error, eager = error / len(draws) ** 0.5, eager / len(draws) ** 0.5
        assert _allowed(error, eager), (
            f"result {index}: error {error:.3e}, eager's {eager:.3e}, {len(draws)} draws"
        )


def _allowed(error: float, eager: float) -> bool:
    return error <= max(1.1 * eager, FP32_FLOOR)


def _errors(
    fn: Callable[..., list[Tensor]],
    definition: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[tuple[float, float]]:
    """For each output and gradient its error against fp64, and the definition's."""
    ours = gradients(fn, tensors, grads, None)
    eager = gradients(definition, tensors, grads, None)
    exact = gradients(definition, tensors, grads, torch.float64)
    for index, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert a.shape == x.shape and a.dtype == e.dtype, f"result {index}: {a.shape} {a.dtype}"
    return [(distance(a, x), distance(e, x)) for a, e, x in zip(ours, eager, exact, strict=True)]


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
