"""What the operators are measured on: inputs of the AF3 shapes, the definition, and what they must cost at least.

Inputs are seeded normal numbers, never zeros: zeros draw less power and hide errors. About one key in ten is masked.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megafold_bench.errors import UserError
from optimized.ops.attention import reference as attention_reference
from optimized.ops.layer_norm_linear.reference import layer_norm_linear_reference
from optimized.ops.transition.reference import transition_reference
from optimized.ops.triangle_multiplication.reference import TriangleWeights, triangle_multiplication_reference

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


def attention_definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
    """Attention of projections `[rows, tokens, heads, d]` with a bias `[heads, tokens, tokens]`; out in their layout."""
    q, k, v = (t[name].transpose(1, 2)[None] for name in ("q", "k", "v"))
    keep = None if mask is None else mask[None]
    out = attention_reference.attention(q, k, v, t["bias"][None, None], keep)
    return [out[0].transpose(1, 2)]


def _attention(op: str, rows: int | None, heads: int, width: int) -> Operator:
    """Attention over `rows` rows (None: as many as tokens) with one bias for all of them."""

    def make(source: Source, n: int, small: bool) -> Problem:
        r, h = (min(rows or n, 3) if small else rows or n), (2 if small else heads)
        tensors = {name: source.normal(r, n, h, width) for name in ("q", "k", "v")}
        tensors["bias"] = source.normal(h, n, n)
        return Problem(op, tensors, source.mask(r, n), [source.normal(r, n, h, width)], attention_definition)

    def forward(n: int, size: int) -> Cost:
        r = rows or n
        scores, values = r * heads * n * n, r * n * heads * width
        return Cost(4 * scores * width, size * (4 * values + heads * n * n) + r * n, scores)

    def backward(n: int, size: int) -> Cost:
        r = rows or n
        scores, values = r * heads * n * n, r * n * heads * width
        statistics = 4 * r * heads * n
        return Cost(10 * scores * width, size * (8 * values + 2 * heads * n * n) + statistics + r * n, scores)

    where = "N rows" if rows is None else f"{rows} rows"
    return Operator(op, f"{where}, {heads} heads of {width}, bias and key mask", make, forward, backward)


def _triangle_multiplication(outgoing: bool, channels: int = 128) -> Operator:
    direction = "outgoing" if outgoing else "incoming"
    op = f"triangle_multiplication_{direction}"

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = TriangleWeights(*(t[name] for name in TriangleWeights._fields))
        return [triangle_multiplication_reference(t["z"], weights, outgoing, mask)]

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        norms = [*source.norm(c), *source.norm(c)]
        matrices = [source.weight(c, c) for _ in range(6)]
        weights = TriangleWeights._make([*norms[:2], *matrices[:4], *norms[2:], *matrices[4:]])
        tensors = {"z": source.normal(n, n, c), **weights._asdict()}
        settings = {"outgoing": outgoing}
        return Problem(op, tensors, source.mask(n, n), [source.normal(n, n, c)], definition, settings)

    # Forward in three phases: z in, a and b out; a and b in, their product out; it and z in, the update out.
    def forward(n: int, size: int) -> Cost:
        pairs = n * n * channels
        return Cost(12 * pairs * channels + 2 * pairs * n, 9 * pairs * size, 3 * pairs)

    # Backward: both gradients of every product, and a and b once more, which nobody keeps.
    def backward(n: int, size: int) -> Cost:
        pairs = n * n * channels
        return Cost(
            24 * pairs * channels + 8 * pairs * channels + 4 * pairs * n, 18 * pairs * size, 3 * pairs
        )

    summary = f"the whole {direction} update of a pair representation of {channels} channels"
    return Operator(op, summary, make, forward, backward)


def _transition(channels: int = 128, factor: int = 4) -> Operator:
    names = ("norm_weight", "norm_bias", "w_a", "w_b", "w_out")

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        gamma, beta, w_a, w_b, w_out = (t[name] for name in names)
        return [transition_reference(t["x"], gamma, beta, w_a, w_b, w_out)]

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        h = c * factor
        gamma, beta = source.norm(c)
        parameters = (gamma, beta, source.weight(h, c), source.weight(h, c), source.weight(c, h))
        tensors = {"x": source.normal(n, n, c), **dict(zip(names, parameters, strict=True))}
        return Problem("transition", tensors, None, [source.normal(n, n, c)], definition)

    # Backward: two gradients for each of three products, and the hidden layer's two inputs recomputed.
    def forward(n: int, size: int) -> Cost:
        hidden = n * n * channels * factor
        return Cost(6 * hidden * channels, 2 * n * n * channels * size, hidden)

    def backward(n: int, size: int) -> Cost:
        hidden = n * n * channels * factor
        return Cost(16 * hidden * channels, 3 * n * n * channels * size, hidden)

    summary = f"LayerNorm, SwiGLU and projection, {channels} × {factor} channels on N² rows"
    return Operator("transition", summary, make, forward, backward)


def _layer_norm_linear(channels: int = 128, maps: int = 4, heads: int = 4) -> Operator:
    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = [t[f"w_{i}"] for i in range(maps)]
        return layer_norm_linear_reference(t["x"], t["norm_weight"], t["norm_bias"], weights, t["w_head"])

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        gamma, beta = source.norm(c)
        tensors = {"x": source.normal(n, n, c), "norm_weight": gamma, "norm_bias": beta}
        tensors |= {f"w_{i}": source.weight(c, c) for i in range(maps)}
        tensors["w_head"] = source.weight(heads, c)
        grads = [*(source.normal(n, n, c) for _ in range(maps)), source.normal(heads, n, n)]
        return Problem("layer_norm_linear", tensors, None, grads, definition, {"maps": maps})

    width = maps * channels + heads

    def forward(n: int, size: int) -> Cost:
        return Cost(2 * n * n * channels * width, n * n * (channels + width) * size)

    def backward(n: int, size: int) -> Cost:
        return Cost(4 * n * n * channels * width, n * n * (2 * channels + width) * size)

    summary = f"LayerNorm, {maps} maps {channels} → {channels} and a bias of {heads} heads on N² rows"
    return Operator("layer_norm_linear", summary, make, forward, backward)


OPERATORS = {
    operator.name: operator
    for operator in (
        _attention("triangle_attention", rows=None, heads=4, width=32),
        _attention("attention_pair_bias", rows=48, heads=16, width=48),
        _triangle_multiplication(outgoing=True),
        _triangle_multiplication(outgoing=False),
        _transition(),
        _layer_norm_linear(),
    )
}
GROUPS = {"triangle_multiplication": ("triangle_multiplication_outgoing", "triangle_multiplication_incoming")}


def parse_operators(names: tuple[str, ...]) -> tuple[str, ...]:
    """Operators by name, all if none is named; UserError for one that does not exist."""
    found: list[str] = []
    for name in names or tuple(OPERATORS):
        if name not in OPERATORS and name not in GROUPS:
            raise UserError(f"--op {name}: choose from {', '.join([*OPERATORS, *GROUPS])}")
        found += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def parse_dtypes(names: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """Dtypes by name, `default` if none is named; UserError for one that does not exist."""
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtype {name}: choose from {', '.join(DTYPES)}")
    return names or default


def make_problem(op: str, n: int, dtype: str, device: str, seed: int = 0, small: bool = False) -> Problem:
    """The problem of an operator at `n` tokens in a dtype, on a device."""
    return OPERATORS[op].make(Source(device, DTYPES[dtype], seed), n, small)


def relative(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in fp64; NaN where `value` has one."""
    wide = exact.double()
    norm = wide.norm().item()
    return (value.double() - wide).norm().item() / norm if norm else math.inf
