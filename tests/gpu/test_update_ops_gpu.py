"""The conditioned, output and MSA operators on a real GPU: errors against fp64, 100 repeats, long inputs."""

import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, distance

from optimized.ops.conditioned_transition import (
    ConditionedWeights,
    conditioned_transition,
    conditioned_transition_reference,
)
from optimized.ops.gated_output import (
    conditioned_output,
    conditioned_output_reference,
    gated_output,
    gated_output_reference,
)
from optimized.ops.outer_product_mean import (
    OuterWeights,
    outer_product_mean,
    outer_product_mean_reference,
)
from optimized.ops.pair_weighted_averaging import weighted_average, weighted_average_reference

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize(
    ("dtype", "parameter_dtype"), [(BF, FULL), (BF, BF), (HALF, FULL), (FULL, FULL)]
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def randn(*shape, dtype=FULL):
    return torch.randn(*shape, device="cuda").to(dtype)


def matrix(rows, columns, dtype):
    return (randn(rows, columns) / columns**0.5).to(dtype)


def conditioned(samples, n, c, cs, shared, dtype, weights):
    own = (n,) if shared else (samples, n)
    parameters = [
        (1 + 0.2 * randn(cs)).to(weights), matrix(c, cs, weights), randn(c, dtype=weights), matrix(c, cs, weights),
        matrix(2 * c, c, weights), matrix(2 * c, c, weights), matrix(c, 2 * c, weights),
        matrix(c, cs, weights), randn(c, dtype=weights),
    ]  # fmt: skip
    return [2 * randn(samples, n, c, dtype=dtype), randn(*own, cs, dtype=dtype), *parameters], [
        randn(samples, n, c, dtype=dtype)
    ]


CONDITIONED = (
    lambda a, s, *w: [conditioned_transition(a, s, ConditionedWeights(*w))],
    lambda a, s, *w: [conditioned_transition_reference(a, s, ConditionedWeights(*w))],
)


@DTYPES
@pytest.mark.parametrize(("n", "c", "cs", "shared"), [(77, 768, 384, False), (301, 128, 128, True)])
def test_conditioned_transition_errors(n, c, cs, shared, dtype, parameter_dtype):
    check_against_definition(*CONDITIONED, *conditioned(3, n, c, cs, shared, dtype, parameter_dtype))


@DTYPES
def test_conditioned_output_errors(dtype, parameter_dtype):
    x, g, s = randn(3, 75, 768, dtype=dtype), randn(3, 75, 768, dtype=dtype), randn(75, 384, dtype=dtype)
    weights = [matrix(768, 768, parameter_dtype), s, matrix(768, 384, parameter_dtype)]
    tensors = [x, g, *weights, randn(768, dtype=parameter_dtype)]
    check_against_definition(
        lambda *t: [conditioned_output(*t)],
        lambda *t: [conditioned_output_reference(*t)],
        tensors,
        [randn(3, 75, 768, dtype=dtype)],
    )


def output_problem(n, h, c, dtype, parameter_dtype):
    tensors = [randn(n, n, h, dtype=dtype), randn(n, n, h, dtype=dtype), matrix(c, h, parameter_dtype)]
    keep = ((torch.rand(1, n, c, device="cuda") > 0.25) / 0.75).to(dtype)
    fns = tuple(
        lambda x, g, w, r, fn=fn: [fn(x, g, w, r, keep)] for fn in (gated_output, gated_output_reference)
    )
    return fns, [*tensors, randn(n, n, c, dtype=dtype)], [randn(n, n, c, dtype=dtype)]


@DTYPES
@pytest.mark.parametrize(("n", "h", "c"), [(101, 128, 128), (61, 64, 64), (45, 256, 64), (33, 384, 384)])
def test_gated_output_errors(n, h, c, dtype, parameter_dtype):
    fns, tensors, grads = output_problem(n, h, c, dtype, parameter_dtype)
    check_against_definition(*fns, tensors, grads)


@pytest.mark.parametrize(("rows", "columns"), [(1, 63), (8, 8), (5, 13), (10, 13), (1, 1000)])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shared", [None, 0, 1])
def test_gradients_of_few_gated_rows(shared, wide, rows, columns):
    """Fewer than a tile has, as many, and a last tile that overlaps another; dropout shared by rows, by columns or not there.

    `wide`: added to float32, whose gradient is float32 too.
    """
    x, g = (randn(rows, columns, 128, dtype=BF) for _ in range(2))
    residual, grad = (randn(rows, columns, 128, dtype=FULL if wide else BF) for _ in range(2))
    shape = [rows, columns, 128]
    if shared is not None:
        shape[shared] = 1
    keep = (torch.rand(shape, device="cuda") > 0.25).to(grad.dtype) / 0.75 if shared is not None else None
    leaves = [t.requires_grad_() for t in (x, g, matrix(128, 128, FULL))]
    of_double = [t.detach().double().requires_grad_() for t in leaves]
    with torch.autocast("cuda", BF):
        found = torch.autograd.grad(gated_output(*leaves, residual, keep), leaves, grad)
    exact = gated_output_reference(*of_double, residual, None if keep is None else keep.double())
    for one, other in zip(found, torch.autograd.grad(exact, of_double, grad.double()), strict=True):
        assert distance(one, other) < 2**-6


def outer_problem(rows, n, dtype, parameter_dtype):
    mask = torch.rand(rows, n, device="cuda") > 0.2
    shapes = [(32, 64), (32, 64), (128, 1024)]
    norm = [(1 + 0.2 * randn(64)).to(parameter_dtype), (0.1 * randn(64)).to(parameter_dtype)]
    weights = [*norm, *(matrix(*s, parameter_dtype) for s in shapes), randn(128, dtype=parameter_dtype)]
    fns = (
        lambda m, *w: [outer_product_mean(m, mask, OuterWeights(*w))],
        lambda m, *w: [outer_product_mean_reference(m, mask, OuterWeights(*w))],
    )
    return fns, [randn(rows, n, 64, dtype=dtype), *weights], [randn(n, n, 128, dtype=dtype)]


@DTYPES
@pytest.mark.parametrize(("rows", "n"), [(130, 70), (33, 301)])
def test_outer_product_mean_errors(rows, n, dtype, parameter_dtype):
    fns, tensors, grads = outer_problem(rows, n, dtype, parameter_dtype)
    check_against_definition(*fns, tensors, grads)


def averaging_problem(rows, n, width, dtype):
    mask = torch.rand(n, device="cuda") > 0.1
    fns = tuple(
        lambda v, x, fn=fn: [fn(v, x.movedim(-1, 0), mask)]
        for fn in (weighted_average, weighted_average_reference)
    )
    tensors = [randn(rows, n, 8, width, dtype=dtype), randn(n, n, 8, dtype=dtype)]
    return fns, tensors, [randn(rows, n, 8, width, dtype=dtype)]


@pytest.mark.parametrize("dtype", [BF, HALF, FULL])
@pytest.mark.parametrize(("rows", "n", "width"), [(40, 150, 8), (17, 333, 32)])
def test_pair_weighted_averaging_errors(rows, n, width, dtype):
    fns, tensors, grads = averaging_problem(rows, n, width, dtype)
    check_against_definition(*fns, tensors, grads)


def test_hundred_repeats_are_bitwise_equal():
    check_bitwise(CONDITIONED[0], *conditioned(4, 96, 768, 384, False, BF, FULL), times=100)
    for fns, tensors, grads in (
        output_problem(90, 128, 128, BF, FULL),
        outer_problem(64, 200, BF, FULL),
        averaging_problem(64, 200, 8, BF),
    ):
        check_bitwise(fns[0], tensors, grads, times=100)


def test_gated_output_past_two_to_the_31_elements():
    """Of the first rows and the last: rows do not depend on each other."""
    rows = 2**31 // 128 + 640
    x, g = (torch.randn(1, rows, 128, device="cuda", dtype=BF).requires_grad_() for _ in range(2))
    w, grad = matrix(128, 128, BF), torch.randn(1, rows, 128, device="cuda", dtype=BF)
    y = gated_output(x, g, w)
    found = torch.autograd.grad(y, (x, g), grad)
    for part in (slice(0, 512), slice(rows - 512, rows)):
        own = [t[:, part].detach().double().requires_grad_() for t in (x, g)]
        exact = gated_output_reference(*own, w)
        assert distance(y[:, part], exact) < 1e-2
        wanted = torch.autograd.grad(exact, own, grad[:, part].double())
        for one, other in zip(found, wanted, strict=True):
            assert distance(one[:, part], other) < 2**-6


def test_averaging_past_two_to_the_31_elements():
    rows, n = 2**31 // (256 * 256) + 16, 256
    v = torch.randn(rows, n, 8, 32, device="cuda", dtype=BF)
    logits = randn(8, n, n)
    with torch.no_grad():
        o = weighted_average(v, logits)
        exact = weighted_average_reference(v[-4:].double(), logits.double())
    assert distance(o[-4:], exact) < 1e-2


@pytest.mark.parametrize("op", ["conditioned", "output", "outer", "averaging"])
def test_inside_a_cuda_graph(op):
    """Both passes can be captured and replayed on new values."""
    fns, tensors, grads = {
        "conditioned": lambda: (CONDITIONED, *conditioned(2, 64, 768, 384, False, BF, BF)),
        "output": lambda: output_problem(64, 128, 128, BF, BF),
        "outer": lambda: outer_problem(32, 64, BF, BF),
        "averaging": lambda: averaging_problem(32, 64, 8, BF),
    }[op]()
    leaves = [t.requires_grad_() for t in tensors]

    def step():
        (y,) = fns[0](*leaves)
        return [y, *torch.autograd.grad(y, leaves, grads[0])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].mul_(1.5)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)
