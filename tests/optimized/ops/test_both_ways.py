"""Plain eager calls skip the dispatcher; results and gradients have the bits of the registered operators."""

import pytest
import torch

from optimized.ops.adaptive_layer_norm import adaptive_layer_norm
from optimized.ops.adaptive_layer_norm import op as adaptive_op
from optimized.ops.conditioned_transition import ConditionedWeights, conditioned_transition
from optimized.ops.conditioned_transition import op as conditioned_op
from optimized.ops.gated_output import add_update, conditioned_output, gated_output
from optimized.ops.gated_output import conditioned as output_op
from optimized.ops.gated_output import op as gated_op
from optimized.ops.outer_product_mean import op as outer_op
from optimized.ops.outer_product_mean import projected_outer
from optimized.ops.pair_weighted_averaging import op as averaging_op
from optimized.ops.pair_weighted_averaging import weighted_average

N, C, CS = 5, 16, 24
KEEP = torch.ones(1, N, C)
MASK = torch.tensor([True, False, True, True, True])
SCALE = torch.full((N, N), 0.3)
ADAPTIVE = [(3, N, C), (N, CS), (CS,), (C, CS), (C,), (C, CS)]
CASES = {
    "adaptive_layer_norm": (adaptive_op, adaptive_layer_norm, ADAPTIVE),
    "conditioned_transition": (
        conditioned_op,
        lambda a, s, *w: conditioned_transition(a, s, ConditionedWeights(*w)),
        [*ADAPTIVE, (2 * C, C), (2 * C, C), (C, 2 * C), (C, CS), (C,)],
    ),
    "conditioned_output": (
        output_op,
        conditioned_output,
        [(3, N, C), (3, N, C), (C, C), (N, CS), (C, CS), (C,)],
    ),
    "gated_output": (gated_op, gated_output, [(N, N, C), (N, N, C), (C, C)]),
    "gated_output with residual": (
        gated_op,
        lambda *t: gated_output(*t, KEEP),
        [(N, N, C), (N, N, C), (C, C), (N, N, C)],
    ),
    "add_update": (gated_op, lambda z, u: add_update(z, u, KEEP), [(N, N, C), (N, N, C)]),
    "projected_outer": (
        outer_op,
        lambda *t: projected_outer(*t, SCALE),
        [(4, N, 8), (4, N, 8), (C, 64), (C,)],
    ),
    "weighted_average": (averaging_op, lambda *t: weighted_average(*t, MASK), [(4, N, 2, 8), (2, N, N)]),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same_bits(name, monkeypatch):
    torch.manual_seed(0)
    module, fn, shapes = CASES[name]
    leaves = [torch.randn(s).to(torch.bfloat16 if k < 2 else torch.float32) for k, s in enumerate(shapes)]
    leaves = [t.requires_grad_() for t in leaves]

    def both_passes():
        y = fn(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    straight = both_passes()
    assert type(straight[0].grad_fn).__name__ == "DirectBackward"
    monkeypatch.setattr(module, "direct", lambda tensors: False)
    registered = both_passes()
    assert type(registered[0].grad_fn).__name__ != "DirectBackward"
    for a, b in zip(straight, registered, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
