"""What an operator is measured on: seeded inputs, a definition, and what it must cost at least.

Inputs are seeded normal numbers, never zeros: zeros draw less power and hide errors. About one key in ten is masked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MASKED_SHARE = 0.1

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors, Tensor | None], list[Tensor]]
"""An operator: named differentiable inputs and a mask in, outputs out."""


@dataclass(frozen=True)
class Cost:
    """What a pass must do at least: FLOPs of matrix products, bytes moved to and from memory, exponentials."""

    flops: float
    bytes: float
    exps: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.exps + other.exps)


class Source:
    """Random inputs of one seed on one device. Values are drawn in fp32 and rounded, so dtypes see the same numbers."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal numbers in the dtype of the problem."""
        values = torch.randn(shape, generator=self._generator, device=self.device)
        return values.mul_(scale).add_(mean).to(self.dtype)

    def weight(self, rows: int, columns: int) -> Tensor:
        """A weight matrix `[rows, columns]` that keeps the variance of what it maps."""
        return self.normal(rows, columns, scale=columns**-0.5)

    def norm(self, channels: int) -> tuple[Tensor, Tensor]:
        """γ and β of a layer norm."""
        return self.normal(channels, scale=0.2, mean=1.0), self.normal(channels, scale=0.1)

    def mask(self, *shape: int) -> Tensor:
        """A boolean mask, True = keep; the first key of every row is kept, so that no row is empty."""
        keep = torch.rand(shape, generator=self._generator, device=self.device) > MASKED_SHARE
        keep[..., 0] = True
        return keep


@dataclass(frozen=True)
class Problem:
    """One operator at one length: `tensors` are differentiated, `grads` are the gradients of the outputs."""

    op: str
    tensors: dict[str, Tensor]
    mask: Tensor | None
    grads: list[Tensor]
    definition: Function
    settings: Mapping[str, object] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        grads = [grad.to(dtype) for grad in self.grads]
        return Problem(self.op, tensors, self.mask, grads, self.definition, self.settings)


@dataclass(frozen=True)
class Operator:
    """How to make a problem of `n` tokens (`small`: narrow enough for an interpreter), and its costs by pass.

    The costs are functions of the tokens and the bytes of an element.
    """

    name: str
    summary: str
    make: Callable[[Source, int, bool], Problem]
    forward: Callable[[int, int], Cost]
    backward: Callable[[int, int], Cost]

    def cost(self, passes: str, tokens: int, dtype: torch.dtype) -> Cost:
        """The cost of `fwd`, `bwd` or `fwdbwd`."""
        size = dtype.itemsize
        parts = {"fwd": self.forward(tokens, size), "bwd": self.backward(tokens, size)}
        return parts["fwd"] + parts["bwd"] if passes == "fwdbwd" else parts[passes]
