"""The joint backward kernel on a GPU, with the tiles meant for Hopper: accuracy, repeatability, chunks, graphs, long inputs.

Its dq is summed by additions in the L2 cache whose order these tests watch.
"""

import pytest
import torch

from optimized.ops.attention import (
    attention,
    attention_backward,
    attention_with_lse,
    joint_launch,
    launch,
    reference,
)
from optimized.ops.tuning import forget
from tests.gpu.test_attention_gpu import NAMES, make, relative, with_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
BF16 = torch.bfloat16


@pytest.fixture(params=["planes", "bias kernel"], autouse=True)
def joint(request, monkeypatch):
    """Take all gradients jointly, or all but dbias; no other kernel may take them."""
    alone = request.param == "bias kernel"

    def plan_for(q, precision):
        base = launch.default_plan(BF16, q.shape[-1], "sm_90")
        bias = launch._tile(64, 64, 2) if alone else None
        return launch.Plan(base.forward, base.grad_kv, bias, base.grad_q, launch.joint_tile(q.shape[-1]))

    monkeypatch.setattr(launch, "plan_for", plan_for)
    monkeypatch.setattr(launch, "grad_kv_kernel", None)
    forget()
    yield
    forget()


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (97, 301)])
def test_error_no_larger_than_eager(dim, queries, keys):
    leaves, mask, do = make(5, 2, queries, keys, dim, BF16)
    exact = with_grads(reference.attention, leaves, mask, do, torch.float64)
    eager = with_grads(reference.attention, leaves, mask, do, BF16)
    ours = with_grads(attention, leaves, mask, do, BF16)
    for name, a, e, x in zip(NAMES, ours, eager, exact, strict=True):
        assert relative(a, x) <= 1.1 * relative(e, x), (name, relative(a, x), relative(e, x))


@pytest.mark.parametrize("limit", [1, 8 << 20])
def test_hundred_repeats_in_chunks_are_bitwise_equal(limit, monkeypatch):
    """A group of rows at a time with a split for each key tile, and several groups whose programs take several tiles."""
    monkeypatch.setattr(joint_launch, "LEAST_WORKSPACE", limit)
    monkeypatch.setattr(joint_launch, "WORKSPACE", 0.0)
    leaves, mask, do = make(65, 4, 600, 600, 32, BF16)
    first = with_grads(attention, leaves, mask, do, BF16)
    eager = with_grads(reference.attention, leaves, mask, do, torch.float32)
    for name, a, x in zip(NAMES, first, eager, strict=True):
        assert relative(a, x.double()) < 6e-3, name
    for _ in range(100):
        again = with_grads(attention, leaves, mask, do, BF16)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_cuda_graph_replays():
    leaves, mask, do = make(8, 4, 160, 160, 32, BF16)
    o, lse = attention_with_lse(*leaves, mask)
    wanted = attention_backward(do, *leaves, mask, o, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = attention_backward(do, *leaves, mask, o, lse)
    for x in grads:
        x.fill_(float("nan"))
    graph.replay()
    for a, b in zip(grads, wanted, strict=True):
        assert torch.equal(a, b)


def test_more_than_two_to_the_31_elements():
    """As the test of the other kernels: 4096 rows of 4096 tokens in ending-node memory order."""
    n, heads, dim = 4096, 4, 32
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of free device memory")
    q, k, v, do = (
        torch.randn(1, n, n, heads, dim, device="cuda", dtype=BF16).permute(0, 2, 3, 1, 4) for _ in range(4)
    )
    bias = torch.randn(1, 1, heads, n, n, device="cuda", dtype=BF16)
    o, lse = attention_with_lse(q, k, v, bias)
    grads = attention_backward(do, q, k, v, bias, None, o, lse)
    for row in (0, n - 1):
        part = [x[:, row : row + 1] for x in (q, k, v)]
        exact = with_grads(reference.attention, [*part, bias], None, do[:, row : row + 1], torch.float32)
        for name, a, x in zip(NAMES[1:4], grads[:3], exact[1:4], strict=True):
            assert relative(a[:, row : row + 1], x.double()) < 0.01, (name, row)
