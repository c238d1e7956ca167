"""Comparison of an operator with its definition: errors against fp64, and repeatability."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimized.kernels.verify import ALLOWED_RATIO, Errors, judge


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
    """Outputs and all gradients are as near to fp64 as `verify` asks; further draws are of the output gradients."""

    def errors(grads: Sequence[Tensor]) -> Errors:
        ours = gradients(fn, tensors, grads, None)
        eager = gradients(definition, tensors, grads, None)
        exact = gradients(definition, tensors, grads, torch.float64)
        own, definitions = {}, {}
        for index, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
            assert a.shape == x.shape and a.dtype == e.dtype, f"result {index}: {a.shape} {a.dtype}"
            own[f"result {index}"], definitions[f"result {index}"] = distance(a, x), distance(e, x)
        return own, definitions

    def again(_: int) -> Errors:
        return errors([torch.randn_like(g) * g.float().std().to(g.dtype) for g in grads])

    found = judge(errors(grads), again)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= ALLOWED_RATIO, f"{worst}: {found[worst]:.3f} times the definition's error"


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
