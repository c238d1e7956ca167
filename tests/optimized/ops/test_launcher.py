import pytest
import torch
from fused_checks import parameters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from optimized.ops.launcher import direct
from optimized.ops.parameters import fold, gradient_dtype, pack, unpacked
from optimized.ops.triangle_multiplication import TriangleWeights, triangle_multiplication


def test_watched_calls_go_through_the_registered_operator():
    tensor = torch.zeros(3)
    assert direct((tensor, torch.nn.Parameter(tensor)))
    with FlopCounterMode(display=False):
        assert not direct((tensor,))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(tensor)
    assert not direct((tensor, fake))
    assert not torch.func.vmap(lambda t: torch.full_like(t, direct((tensor,))))(tensor).any()


@pytest.mark.parametrize("into_z", [False, True])
def test_both_ways_give_the_same_bits(into_z):
    torch.manual_seed(0)
    c = 16
    weights = parameters([(c,), (c,), *[(c, c)] * 4, (c,), (c,), (c, c), (c, c)], torch.float32)
    leaves = [t.requires_grad_() for t in (torch.randn(9, 9, c).to(torch.bfloat16), *weights)]
    mask = torch.rand(9, 9) > 0.2
    grad = torch.randn(9, 9, c).to(torch.bfloat16)
    residual = leaves[0] if into_z else None
    weights = TriangleWeights(*leaves[1:])
    straight = triangle_multiplication(leaves[0], weights, False, mask, residual=residual)
    op = torch.ops.megafold_bench.triangle_multiplication
    registered = op(*leaves, mask, residual, None, False, 1e-5, torch.bfloat16)[0]
    assert torch.equal(straight, registered)
    pairs = zip(
        torch.autograd.grad(straight, leaves, grad),
        torch.autograd.grad(registered, leaves, grad),
        strict=True,
    )
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_packed_in_order(dtype):
    weights = [torch.randn(5, 7), torch.randn(3), torch.randn(50, 60)]
    whole = pack(weights, dtype)
    assert torch.equal(whole, torch.cat([w.flatten() for w in weights]).to(dtype))
    turned = [weights[0].t(), weights[2]]
    assert torch.equal(pack(turned, dtype), torch.cat([w.flatten() for w in turned]).to(dtype))


def test_sums_are_folded_in_order():
    tall = [torch.randn(300, 40), torch.randn(1, 33)]
    wide = [torch.randn(9, 700), torch.randn(17, 64)]
    for t, w in ((tall, wide), (tall[:1], wide[:1]), (tall, wide[1:])):
        found = fold(t, w, torch.float32)
        torch.testing.assert_close(found, torch.cat([m.sum(0) for m in (*t, *w)]), rtol=1e-5, atol=1e-5)


def test_gradients_keep_the_dtype_that_all_parameters_share():
    low = [torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)]
    assert gradient_dtype(low) == torch.bfloat16
    assert gradient_dtype([*low, torch.zeros(1)]) == torch.float32
    parts = unpacked(torch.arange(10.0), low)
    assert [p.shape for p in parts] == [(2, 3), (4,)] and parts[1].dtype == torch.bfloat16
