"""Every implementation of every operator, behind one signature: named inputs and a mask in, outputs out.

The inputs are laid out as AF3's projections leave them, `[rows, tokens, heads, d]`. What an implementation needs
besides (another layout, an additive mask, a bias of another dtype) is made inside the timed call, because whoever
calls it has to make it.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from baselines.peers import PACKAGES, importing
from megafold_bench.errors import UserError
from megafold_bench.outcomes import UnsupportedError
from optimized.kernels import peers
from optimized.kernels.problem import Function, Problem, Tensors
from optimized.kernels.update_problems import ADAPTIVE, dropout, picked, present
from optimized.ops.triangle_multiplication.reference import TriangleWeights

Builder = Callable[[Problem], Function]
"""Makes the function for problems like this one, or raises `UnsupportedError` with the reason."""

MODULES = {"cuequivariance": "cuequivariance_torch", "trifast": "trifast", "ds4sci": "deepspeed"}
"""What an implementation imports, where that need not be installed."""
NOT_FLOAT32 = "tf32x3 is about products of float32"
ATTENTION = ("triangle_attention", "attention_pair_bias")
TRIANGLE = ("triangle_multiplication_outgoing", "triangle_multiplication_incoming")


def _definition(problem: Problem) -> Function:
    return problem.definition


def _compiled(problem: Problem) -> Function:
    # Lengths are measured one by one, each with code compiled for it: the best case of torch.compile.
    return torch.compile(problem.definition, dynamic=False)


def _require(verdict: tuple[bool, str]) -> None:
    if not verdict[0]:
        raise UnsupportedError(f"{verdict[1]}: the definition would run")


def _megafold_attention(problem: Problem, precision: str = "ieee") -> Function:
    from optimized.ops.attention import attention, supported

    def inputs(t: Tensors, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = (t[name].transpose(1, 2)[None] for name in ("q", "k", "v"))
        return q, k, v, t["bias"][None, None], None if mask is None else mask[None]

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        return [attention(*inputs(t, mask), precision=precision).squeeze(0).transpose(1, 2)]

    _require(supported(*inputs(problem.tensors, problem.mask)))
    return run


def _megafold_tf32x3(problem: Problem) -> Function:
    """Three TF32 products for each of float32, as PyTorch's memory-efficient attention takes them on NVIDIA GPUs."""
    if problem.tensors["q"].dtype != torch.float32:
        raise UnsupportedError(NOT_FLOAT32)
    if torch.version.hip is not None:
        raise UnsupportedError("TF32 products exist on NVIDIA only")
    return _megafold_attention(problem, "tf32x3")


def _megafold_triangle(problem: Problem) -> Function:
    from optimized.ops.triangle_multiplication import supported, triangle_multiplication

    outgoing = bool(problem.settings["outgoing"])

    def weights(t: Tensors) -> TriangleWeights:
        return TriangleWeights(*(t[name] for name in TriangleWeights._fields))

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        return [triangle_multiplication(t["z"], weights(t), outgoing, mask)]

    _require(supported(problem.tensors["z"], weights(problem.tensors), problem.mask))
    return run


def _megafold_transition(problem: Problem) -> Function:
    from optimized.ops.transition import supported, transition

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        return [transition(t["x"], t["norm_weight"], t["norm_bias"], t["w_a"], t["w_b"], t["w_out"])]

    _require(supported(**problem.tensors))
    return run


def _megafold_linear(problem: Problem) -> Function:
    from optimized.ops.layer_norm_linear import layer_norm_linear, supported

    maps = int(str(problem.settings["maps"]))

    def inputs(t: Tensors) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        return t["x"], t["norm_weight"], t["norm_bias"], [t[f"w_{i}"] for i in range(maps)], t["w_head"]

    _require(supported(*inputs(problem.tensors)))
    return lambda t, mask: list(layer_norm_linear(*inputs(t)))


def _megafold_triangle_attention(problem: Problem) -> Function:
    from optimized.ops.triangle_attention import (
        Orientation,
        TriangleAttentionWeights,
        supported,
        triangle_attention,
    )

    heads = int(str(problem.settings["heads"]))

    def weights(t: Tensors) -> TriangleAttentionWeights:
        return TriangleAttentionWeights(*picked(t, TriangleAttentionWeights._fields))

    def run(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        return [triangle_attention(t["z"], weights(t), heads, Orientation(False, False), mask)]

    _require(supported(problem.tensors["z"], weights(problem.tensors), heads, problem.mask))
    return run


def _megafold_gated_output(problem: Problem) -> Function:
    from optimized.ops.gated_output import gated_output, supported

    def inputs(t: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        keep = dropout(t["x"], problem.settings["keep"])
        return t["x"], t["gate"], t["weight"], t["residual"], keep

    _require(supported(*inputs(problem.tensors)))
    return lambda t, mask: [gated_output(*inputs(t))]


def _megafold_outer(problem: Problem) -> Function:
    from optimized.ops.outer_product_mean import OuterWeights, outer_product_mean, supported

    def inputs(t: Tensors, mask: Tensor | None) -> tuple[Tensor, Tensor, OuterWeights]:
        return t["m"], present(t["m"], mask), OuterWeights(*picked(t, OuterWeights._fields))

    _require(supported(*inputs(problem.tensors, problem.mask)))
    return lambda t, mask: [outer_product_mean(*inputs(t, mask))]


def _megafold_averaging(problem: Problem) -> Function:
    from optimized.ops.pair_weighted_averaging import supported, weighted_average

    _require(supported(problem.tensors["v"], problem.tensors["logits"], problem.mask))
    return lambda t, mask: [weighted_average(t["v"], t["logits"], mask)]


def _megafold_adaptive(problem: Problem) -> Function:
    from optimized.ops.adaptive_layer_norm import adaptive_layer_norm, supported

    def inputs(t: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return t["a"], t["s"], t["norm_weight"], t["scale"], t["scale_bias"], t["shift"]

    _require(supported(*inputs(problem.tensors)))
    return lambda t, mask: [adaptive_layer_norm(*inputs(t))]


def _megafold_conditioned(problem: Problem) -> Function:
    from optimized.ops.conditioned_transition import ConditionedWeights, conditioned_transition, supported

    names = (*ADAPTIVE, "w_a", "w_b", "w_out", "w_gate", "w_gate_bias")

    def inputs(t: Tensors) -> tuple[Tensor, Tensor, ConditionedWeights]:
        return t["a"], t["s"], ConditionedWeights(*picked(t, names))

    _require(supported(*inputs(problem.tensors)))
    return lambda t, mask: [conditioned_transition(*inputs(t))]


def _megafold_products(problem: Problem) -> Function:
    from optimized.ops.linear import linear, supported

    names = ("x", "weight", "bias")
    _require(supported(*picked(problem.tensors, names)))
    return lambda t, mask: [linear(*picked(t, names))]


def _for_all(builder: Builder, *ops: str) -> dict[str, Builder]:
    return dict.fromkeys(ops, builder)


MEGAFOLD: dict[str, Builder] = {
    **_for_all(_megafold_attention, *ATTENTION),
    **_for_all(_megafold_triangle, *TRIANGLE),
    "triangle_attention_update": _megafold_triangle_attention,
    "transition": _megafold_transition,
    "layer_norm_linear": _megafold_linear,
    "gated_output": _megafold_gated_output,
    "outer_product_mean": _megafold_outer,
    "pair_weighted_averaging": _megafold_averaging,
    "adaptive_layer_norm": _megafold_adaptive,
    "conditioned_transition": _megafold_conditioned,
    "linear": _megafold_products,
}
BUILDERS: dict[str, dict[str, Builder]] = {
    "definition": _for_all(_definition, *MEGAFOLD),
    "compile": _for_all(_compiled, *MEGAFOLD),
    "sdpa": _for_all(peers.sdpa, *ATTENTION),
    "flex": _for_all(peers.flex, *ATTENTION),
    "cuequivariance": {
        **_for_all(peers.cuequivariance_attention, *ATTENTION),
        **_for_all(peers.cuequivariance_triangle, *TRIANGLE),
    },
    "trifast": _for_all(peers.trifast, *ATTENTION),
    "ds4sci": _for_all(peers.ds4sci, *ATTENTION),
    "megafold": MEGAFOLD,
    "megafold-tf32x3": _for_all(_megafold_tf32x3, *ATTENTION),
}


def parse_implementations(names: tuple[str, ...]) -> tuple[str, ...]:
    """Implementations by name, all if none is named; UserError for one that does not exist."""
    for name in names:
        if name not in BUILDERS:
            raise UserError(f"--impl {name}: choose from {', '.join(BUILDERS)}")
    return names or tuple(BUILDERS)


def implements(name: str, op: str) -> bool:
    """Whether an implementation has the operator at all."""
    return op in BUILDERS[name]


def hindrance(name: str, dtype: str) -> str:
    """Why an implementation can run nowhere here in `dtype`, as far as is seen without loading it; else empty."""
    if name in MODULES and find_spec(MODULES[name]) is None:
        return f"not installed: no module {MODULES[name]}"
    return NOT_FLOAT32 if name == "megafold-tf32x3" and dtype != "fp32" else ""


def build(name: str, problem: Problem) -> Function:
    """The function of an implementation for problems like this one; UnsupportedError says why there is none."""
    if not implements(name, problem.op):
        raise UnsupportedError(f"{name} has no {problem.op}")
    if name in PACKAGES and next(iter(problem.tensors.values())).device.type != "cuda":
        raise UnsupportedError(f"{name} needs a GPU")
    with importing():
        return BUILDERS[name][problem.op](problem)
