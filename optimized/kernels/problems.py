"""Every operator as a problem of any length and dtype, by name."""

import math

from torch import Tensor

from megafold_bench.errors import UserError
from optimized.kernels import pair_problems as pair
from optimized.kernels import update_problems as update
from optimized.kernels.problem import DTYPES, Problem, Source

OPERATORS = {
    operator.name: operator
    for operator in (
        pair.attention("triangle_attention", rows=None, heads=4, width=32),
        pair.attention("attention_pair_bias", rows=48, heads=16, width=48),
        update.triangle_attention(),
        pair.triangle_multiplication(outgoing=True),
        pair.triangle_multiplication(outgoing=False),
        pair.transition(),
        pair.layer_norm_linear(),
        update.gated_output(),
        update.outer_product_mean(),
        update.pair_weighted_averaging(),
        update.adaptive_layer_norm(),
        update.conditioned_transition(),
        update.linear(),
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
