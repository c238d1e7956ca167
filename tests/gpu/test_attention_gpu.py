"""Attention with a shared pair bias on a GPU: accuracy, repeatability, long inputs, graphs, recompilation."""

import pytest
import torch

from optimized.ops.attention import attention, attention_backward, attention_with_lse, reference, supported
from optimized.ops.attention.forward import forward_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
NAMES = ("o", "dq", "dk", "dv", "dbias")


def make(rows, heads, queries, keys, dim, dtype, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def tensor(length):
        x = torch.randn(1, rows, length, heads, dim, generator=g, device="cuda").to(dtype)
        return x.transpose(-2, -3)

    bias = torch.randn(1, 1, heads, queries, keys, generator=g, device="cuda").to(dtype)
    mask = torch.rand(1, rows, keys, generator=g, device="cuda") > 0.1
    mask[:, 0] = False
    return [tensor(queries), tensor(keys), tensor(keys), bias], mask, tensor(queries)


def with_grads(f, leaves, mask, do, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    o = f(*leaves, mask)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))]


def relative(a, b) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (97, 301)])
def test_error_no_larger_than_eager(dtype, dim, queries, keys):
    leaves, mask, do = make(5, 2, queries, keys, dim, dtype)
    assert supported(*leaves, mask) == (True, "")
    exact = with_grads(reference.attention, leaves, mask, do, torch.float64)
    eager = with_grads(reference.attention, leaves, mask, do, dtype)
    floor = 6 * 2.0**-24 if dtype == torch.float32 else 0.0
    ours = with_grads(attention, leaves, mask, do, dtype)
    for name, a, e, x in zip(NAMES, ours, eager, exact, strict=True):
        assert relative(a, x) <= max(1.1 * relative(e, x), floor), (name, relative(a, x), relative(e, x))


@pytest.mark.parametrize("shift", [300.0, -300.0])
def test_large_logits(shift):
    leaves, mask, do = make(3, 2, 100, 130, 32, torch.bfloat16)
    leaves[3] = leaves[3] + torch.linspace(0, shift, 100, device="cuda")[:, None].bfloat16()
    exact = with_grads(reference.attention, leaves, mask, do, torch.float64)
    eager = with_grads(reference.attention, leaves, mask, do, torch.bfloat16)
    ours = with_grads(attention, leaves, mask, do, torch.bfloat16)
    for name, a, e, x in zip(NAMES, ours, eager, exact, strict=True):
        assert relative(a, x) <= 1.1 * relative(e, x), name


def test_hundred_repeats_are_bitwise_equal():
    leaves, mask, do = make(64, 4, 200, 200, 32, torch.bfloat16)
    first = with_grads(attention, leaves, mask, do, torch.bfloat16)
    for _ in range(100):
        again = with_grads(attention, leaves, mask, do, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_more_than_two_to_the_31_elements():
    """4096 rows of 4096 tokens, 4 heads of 32, ending-node memory order: offsets exceed 31 bits along tokens."""
    n, heads, dim = 4096, 4, 32
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    q, k, v, do = (
        torch.randn(1, n, n, heads, dim, device="cuda", dtype=torch.bfloat16).permute(0, 2, 3, 1, 4)
        for _ in range(4)
    )
    bias = torch.randn(1, 1, heads, n, n, device="cuda", dtype=torch.bfloat16)
    o, lse = attention_with_lse(q, k, v, bias)
    grads = attention_backward(do, q, k, v, bias, None, o, lse)
    for row in (0, n - 1):
        part = [x[:, row : row + 1] for x in (q, k, v)]
        exact = with_grads(reference.attention, [*part, bias], None, do[:, row : row + 1], torch.float32)
        for name, a, x in zip(NAMES[:4], (o, *grads[:3]), exact, strict=False):
            assert relative(a[:, row : row + 1], x.double()) < 0.01, (name, row)


def test_new_lengths_do_not_recompile():
    for n in (160, 192):
        leaves, mask, do = make(3, 4, n, n, 32, torch.bfloat16)
        with_grads(attention, leaves, mask, do, torch.bfloat16)
    caches = forward_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(caches)
    for n in (129, 176, 200, 255, 301):
        leaves, mask, do = make(5, 4, n, n, 32, torch.bfloat16)
        with_grads(attention, leaves, mask, do, torch.bfloat16)
    assert len(caches) == before


def test_cuda_graph_replays():
    leaves, mask, do = make(8, 4, 160, 160, 32, torch.bfloat16)
    expected = attention_with_lse(*leaves, mask)
    wanted = attention_backward(do, *leaves, mask, *expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attention_with_lse(*leaves, mask)
        grads = attention_backward(do, *leaves, mask, o, lse)
    for x in (o, lse, *grads):
        x.fill_(float("nan"))
    graph.replay()
    for a, b in zip((o, lse, *grads), (*expected, *wanted), strict=True):
        assert torch.equal(a, b)
