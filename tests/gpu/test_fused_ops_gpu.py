"""Fused operators on a real GPU: errors against fp64, 100 bitwise repeats, lengths past 2³¹ elements."""

from functools import partial

import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, distance, parameters

from optimized.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference
from optimized.ops.transition import transition, transition_reference
from optimized.ops.triangle_multiplication import (
    TriangleWeights,
    triangle_multiplication,
    triangle_multiplication_reference,
)

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def pair_input(n, c, dtype):
    z = (torch.randn(n, n, c, device="cuda") * 2 + 0.3).to(dtype)
    return z, torch.randn(n, n, c, device="cuda").to(dtype)


def transition_parameters(c, factor, dtype):
    h = factor * c
    return parameters([(c,), (c,), (h, c), (h, c), (c, h)], dtype, "cuda")


def triangle_parameters(c, h, dtype):
    return parameters([(c,), (c,), *[(h, c)] * 4, (h,), (h,), (c, h), (c, c)], dtype, "cuda")


def transitions():
    return lambda *t: [transition(*t)], lambda *t: [transition_reference(*t)]


def as_maps(fn):
    """LayerNorm and four maps with a narrow one, of tensors in a row."""
    return lambda x, gamma, beta, *w: list(fn(x, gamma, beta, list(w[:4]), w[4]))


def triangles(outgoing, mask):
    return (
        lambda z, *w: [triangle_multiplication(z, TriangleWeights(*w), outgoing, mask)],
        lambda z, *w: [triangle_multiplication_reference(z, TriangleWeights(*w), outgoing, mask)],
    )


@pytest.mark.parametrize(("dtype", "parameter_dtype"), [(BF, FULL), (BF, BF), (HALF, FULL), (FULL, FULL)])
@pytest.mark.parametrize(("n", "c", "factor"), [(96, 128, 4), (61, 128, 2), (61, 64, 2), (20, 384, 4)])
def test_transition_errors(n, c, factor, dtype, parameter_dtype):
    x, grad = pair_input(n, c, dtype)
    check_against_definition(*transitions(), [x, *transition_parameters(c, factor, parameter_dtype)], [grad])


@pytest.mark.parametrize("outgoing", [True, False])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), [(BF, FULL), (BF, BF), (HALF, FULL), (FULL, FULL)])
@pytest.mark.parametrize(("n", "c"), [(96, 128), (101, 64), (101, 128)])
def test_triangle_multiplication_errors(n, c, dtype, parameter_dtype, outgoing):
    z, grad = pair_input(n, c, dtype)
    mask = torch.rand(n, n, device="cuda") > 0.2
    mask[3] = False
    check_against_definition(
        *triangles(outgoing, mask), [z, *triangle_parameters(c, c, parameter_dtype)], [grad]
    )


@pytest.mark.parametrize("n", [64, 101])
@pytest.mark.parametrize("channels", [144, 136])
def test_triangle_multiplication_of_a_part_of_wider_rows(n, channels):
    """Rows as copies of 16 bytes can fetch them, and rows of which every second begins between two; in both orders."""
    wide, grad = pair_input(n, channels, BF)
    weights = triangle_parameters(128, 128, FULL)
    grad = grad[..., :128].contiguous()
    mask = torch.rand(n, n, device="cuda") > 0.2
    for part in (
        lambda wide: wide[..., :128],
        lambda wide: wide[..., :128].transpose(0, 1),
        lambda wide: wide[..., channels - 128 :],
    ):
        ours, definition = (
            lambda wide, *w, fn=fn, part=part: fn(part(wide), *w) for fn in triangles(True, mask)
        )
        check_against_definition(ours, definition, [wide, *weights], [grad])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [BF, FULL])
def test_transition_of_few_rows(dtype, added, factor, rows):
    """Fewer than a tile has, as many, and a last tile that is not full; under autocast."""
    x = (torch.randn(rows, 128, device="cuda") * 2 + 0.3).to(dtype)
    weights = transition_parameters(128, factor, FULL)
    with torch.autocast("cuda", BF):
        found = transition(x, *weights, added=added)
    exact = transition_reference(x.double(), *(w.double() for w in weights), added=added)
    assert found.dtype == (dtype if added else BF)
    assert distance(found, exact) < 2**-7


@pytest.mark.parametrize(("dtype", "parameter_dtype"), [(BF, FULL), (HALF, HALF), (FULL, FULL)])
def test_layer_norm_linear_errors(dtype, parameter_dtype):
    x, grad = pair_input(75, 128, dtype)
    weights = parameters([(128,), (128,), *[(128, 128)] * 4, (4, 128)], parameter_dtype, "cuda")

    grads = [grad] * 4 + [grad[..., :4].movedim(2, 0).contiguous()]
    check_against_definition(
        as_maps(layer_norm_linear), as_maps(layer_norm_linear_reference), [x, *weights], grads
    )


@pytest.mark.parametrize("rows", [1, 63, 65, 1000])
@pytest.mark.parametrize(("maps", "heads"), [(1, 0), (3, 16), (4, 20)])
@pytest.mark.parametrize("dtype", [BF, FULL])
def test_layer_norm_linear_of_few_rows(rows, maps, heads, dtype):
    """Fewer than a tile has, and tiles that are not full; under autocast."""
    x = (torch.randn(rows, 128, device="cuda") * 2 + 0.3).to(dtype)
    gamma, beta, *weights = parameters([(128,), (128,), *[(128, 128)] * maps], FULL, "cuda")
    head = parameters([(heads, 128)], FULL, "cuda")[0] if heads else None
    with torch.autocast("cuda", BF):
        found = layer_norm_linear(x, gamma, beta, weights, head)
    exact = layer_norm_linear_reference(x.double(), gamma, beta, weights, head, 1e-5, torch.double)
    assert len(found) == maps + (heads > 0)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == BF and one.shape == other.shape
        assert distance(one, other) < 2**-7


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("dtype", [BF, FULL])
def test_gradients_of_few_rows(rows, dtype):
    """Fewer than a tile has, as many, and a last tile that is not full or overlaps another; under autocast."""
    x = (torch.randn(rows, 128, device="cuda") * 2 + 0.3).to(dtype)
    gamma, beta, *maps = parameters([(128,), (128,), *[(128, 128)] * 4, (4, 128)], FULL, "cuda")
    for fused, exact, weights in (
        (transition, transition_reference, transition_parameters(128, 4, FULL)),
        (as_maps(layer_norm_linear), as_maps(layer_norm_linear_reference), [gamma, beta, *maps]),
    ):
        leaves = [t.detach().requires_grad_() for t in (x, *weights)]
        with torch.autocast("cuda", BF):
            results = fused(*leaves)
        of_double = [t.detach().double().requires_grad_() for t in leaves]
        expected = exact(*of_double)
        grads = [torch.randn_like(y) for y in (results if isinstance(results, list) else [results])]
        found = torch.autograd.grad(results, leaves, grads if isinstance(results, list) else grads[0])
        wanted = torch.autograd.grad(expected, of_double, [g.double() for g in grads])
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < 2**-6


@pytest.mark.parametrize("n", [96, 101])
@pytest.mark.parametrize("dtype", [BF, HALF, FULL])
def test_updates_added_to_their_input(dtype, n):
    """With z itself as the residual, whose two gradients leave the kernels as one."""
    z, grad = pair_input(n, 128, dtype)
    keep = (torch.rand(n, 1, 128, device="cuda") > 0.25) / 0.75

    def into(fn):
        return lambda z, *w: [fn(z, TriangleWeights(*w), residual=z, keep=keep)]

    triangle = (into(triangle_multiplication), into(triangle_multiplication_reference))
    check_against_definition(*triangle, [z, *triangle_parameters(128, 128, FULL)], [grad])
    added = [lambda *t, fn=fn: [fn(*t, added=True)] for fn in (transition, transition_reference)]
    check_against_definition(*added, [z, *transition_parameters(128, 4, FULL)], [grad])


def multiplied(z, *w):
    return triangle_multiplication(z, TriangleWeights(*w))


def multiplied_into(z, *w):
    return triangle_multiplication(z, TriangleWeights(*w), residual=z)


@pytest.mark.parametrize(
    ("update", "whole", "weights"),
    [
        (multiplied, multiplied_into, lambda: triangle_parameters(128, 128, FULL)),
        (transition, partial(transition, added=True), lambda: transition_parameters(128, 4, FULL)),
    ],
)
def test_updates_of_16_bits_added_to_a_float32_input(update, whole, weights):
    """Under autocast, where what is past the update stays in float32."""
    z, grad = pair_input(96, 128, FULL)
    leaves = [t.detach().requires_grad_() for t in (z, *weights())]
    with torch.autocast("cuda", BF):
        sums, updates = whole(*leaves), update(*leaves)
    assert sums.dtype == FULL and updates.dtype == BF
    assert distance(sums - z, updates) < 2**-7
    of_sums = torch.autograd.grad(sums, leaves, grad)
    of_updates = torch.autograd.grad(updates, leaves, grad.to(BF))
    torch.testing.assert_close(of_sums[0], of_updates[0] + grad)
    assert all(torch.equal(a, b) for a, b in zip(of_sums[1:], of_updates[1:], strict=True))


@pytest.mark.parametrize("dtype", [BF, FULL])
def test_a_narrow_map_past_which_its_input_is_carried(dtype):
    """The gradient of what comes after, added in the kernel, is that which autograd would add."""
    x, after = pair_input(75, 128, dtype)
    parts = parameters([(128,), (128,), (16, 128)], FULL, "cuda")
    leaves = [t.requires_grad_() for t in (x, *parts)]
    grad = torch.randn(16, *x.shape[:-1], device="cuda").to(dtype)

    def run(carried):
        x, gamma, beta, head = leaves
        return layer_norm_linear(x, gamma, beta, [], head, carried=carried)

    bias, carried = run(True)
    found = torch.autograd.grad([bias, carried], leaves, [grad, after])
    apart = torch.autograd.grad(run(False), leaves, grad)
    torch.testing.assert_close(found[0].double(), apart[0].double() + after, atol=2**-6, rtol=2**-7)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], apart[1:], strict=True))


def test_a_narrow_map_alone_in_float32():
    x, _ = pair_input(75, 128, FULL)
    weights = parameters([(128,), (128,), (16, 128)], FULL, "cuda")
    grad = torch.randn(16, *x.shape[:-1], device="cuda")
    check_against_definition(
        lambda x, gamma, beta, head: layer_norm_linear(x, gamma, beta, [], head),
        lambda x, gamma, beta, head: layer_norm_linear_reference(x, gamma, beta, [], head),
        [x, *weights],
        [grad],
    )


def test_memory_of_triangle_multiplication():
    """Both passes hold no more than eight tensors as large as z at a time, and the sums of the weights' gradients."""
    n = 384
    z, grad = pair_input(n, 128, BF)
    leaves = [t.requires_grad_() for t in (z, *triangle_parameters(128, 128, FULL))]
    for _ in range(3):  # the third follows a plan
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(multiplied(*leaves), leaves, grad)
        assert torch.cuda.max_memory_allocated() - before < 8.5 * z.nbytes


def test_hundred_repeats_are_bitwise_equal():
    x, grad = pair_input(90, 128, BF)
    check_bitwise(transitions()[0], [x, *transition_parameters(128, 4, FULL)], [grad], times=100)
    check_bitwise(triangles(True, None)[0], [x, *triangle_parameters(128, 128, FULL)], [grad], times=100)
    maps = parameters([(128,), (128,), *[(128, 128)] * 4, (4, 128)], FULL, "cuda")
    grads = [grad] * 4 + [grad[..., :4].movedim(2, 0).contiguous()]
    check_bitwise(as_maps(layer_norm_linear), [x, *maps], grads, times=100)


def test_transition_past_two_to_the_31_elements():
    rows = 2**31 // 128 + 640
    x = torch.randn(rows, 128, device="cuda", dtype=BF)
    weights = transition_parameters(128, 4, BF)
    with torch.no_grad():
        y = transition(x, *weights)
        for part in (slice(0, 512), slice(rows - 512, rows)):
            exact = transition_reference(x[part].double(), *weights)
            assert distance(y[part], exact) < 1e-2


@pytest.mark.parametrize(
    ("fused", "exact", "weights"),
    [
        (transition, transition_reference, lambda: transition_parameters(128, 4, BF)),
        (
            as_maps(layer_norm_linear),
            as_maps(layer_norm_linear_reference),
            lambda: parameters([(128,), (128,), *[(128, 128)] * 4, (4, 128)], BF, "cuda"),
        ),
    ],
)
def test_input_gradients_past_two_to_the_31_elements(fused, exact, weights):
    """Of the first rows and the last: rows do not depend on each other."""
    rows = 2**31 // 128 + 640
    x = torch.randn(rows, 128, device="cuda", dtype=BF).requires_grad_()
    weights = weights()
    results = fused(x, *weights)
    results = results if isinstance(results, list) else [results]
    grads = [torch.randn_like(y) for y in results]
    (dx,) = torch.autograd.grad(results, x, grads)
    for part in (slice(0, 512), slice(rows - 512, rows)):
        own = x[part].detach().double().requires_grad_()
        of_part = [g[part] if g.shape[0] == rows else g[:, part] for g in grads]
        (wanted,) = torch.autograd.grad(exact(own, *weights), own, [g.double() for g in of_part])
        assert distance(dx[part], wanted) < 2**-6


@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication_past_two_to_the_31_elements(outgoing):
    n, c, block = 4112, 128, 16
    z = torch.randn(n, n, c, device="cuda", dtype=BF)
    weights = TriangleWeights(*triangle_parameters(c, c, BF))
    with torch.no_grad():
        y = triangle_multiplication(z, weights, outgoing)
        exact = corner(z, weights, outgoing, block)
    assert distance(y[-block:, -block:], exact) < 2e-2


def corner(z, weights, outgoing, block):
    """The last block of the definition in fp64, from the rows (outgoing) or columns (incoming) it depends on."""
    w = TriangleWeights(*(t.double() for t in weights))
    edges = (z[-block:] if outgoing else z[:, -block:].transpose(0, 1)).double()

    def norm(t, gamma, beta):
        return torch.nn.functional.layer_norm(t, t.shape[-1:], gamma, beta)

    normed = norm(edges, w.norm_in_weight, w.norm_in_bias)
    a = torch.sigmoid(normed @ w.a_g.T) * (normed @ w.a_p.T)
    b = torch.sigmoid(normed @ w.b_g.T) * (normed @ w.b_p.T)
    x = torch.einsum("ikc,jkc->ijc", a, b)
    gate = torch.sigmoid(norm(z[-block:, -block:].double(), w.norm_in_weight, w.norm_in_bias) @ w.g.T)
    return gate * (norm(x, w.norm_out_weight, w.norm_out_bias) @ w.out.T)
