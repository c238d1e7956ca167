import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, gradients, parameters
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference, supported

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


def problem(shape, channels, hidden, count, heads, dtype, parameter_dtype):
    torch.manual_seed(channels + hidden)
    shapes = [(channels,), (channels,), *[(hidden, channels)] * count]
    shapes += [(heads, channels)] if heads else []
    x = (torch.randn(*shape, channels) * 2 + 0.3).to(dtype)
    grads = [torch.randn(*shape, hidden).to(dtype) for _ in range(count)]
    grads += [torch.randn(heads, *shape).to(dtype)] if heads else []
    return [x, *parameters(shapes, parameter_dtype)], grads


def split(fn, count):
    def run(x, norm_weight, norm_bias, *weights):
        head = weights[count] if len(weights) > count else None
        return fn(x, norm_weight, norm_bias, list(weights[:count]), head)

    return run


@pytest.mark.parametrize(
    ("shape", "channels", "hidden", "count", "heads", "dtype", "parameter_dtype"),
    [
        ((5, 7), 16, 16, 4, 4, FULL, FULL),
        ((5, 7), 24, 32, 3, 0, BF, FULL),
        ((9, 9), 128, 128, 4, 4, BF, FULL),
        ((9, 17), 128, 64, 2, 4, BF, FULL),  # more than a tile of rows, and no whole number of them
        ((5, 31), 24, 40, 3, 2, FULL, FULL),
        ((65,), 32, 48, 1, 3, HALF, HALF),
        ((5, 9), 32, 0, 0, 4, BF, FULL),
        ((2, 33), 64, 40, 2, 16, BF, BF),
        ((9, 9), 128, 0, 0, 16, FULL, FULL),  # the narrow map alone, in fp32: a kernel of its own
        ((5, 9), 24, 0, 0, 3, FULL, FULL),
        ((41,), 136, 0, 0, 5, FULL, FULL),
    ],
)
def test_errors_against_fp64(shape, channels, hidden, count, heads, dtype, parameter_dtype):
    tensors, grads = problem(shape, channels, hidden, count, heads, dtype, parameter_dtype)
    check_against_definition(
        split(layer_norm_linear, count), split(layer_norm_linear_reference, count), tensors, grads
    )


def test_gradients_repeat_bit_for_bit():
    tensors, grads = problem((9, 15), 32, 32, 2, 4, BF, FULL)
    check_bitwise(split(layer_norm_linear, 2), tensors, grads, times=3)


def test_unused_results_have_no_gradient():
    tensors, grads = problem((6, 5), 16, 16, 3, 4, FULL, FULL)

    def one(fn):
        return lambda *leaves: [split(fn, 3)(*leaves)[1]]

    used = [0, 1, 2, 4]

    def only(fn):
        def run(*some):
            leaves = list(tensors)
            for index, value in zip(used, some, strict=True):
                leaves[index] = value
            return one(fn)(*leaves)

        return run

    some = [tensors[index] for index in used]
    ours = gradients(only(layer_norm_linear), some, grads[1:2], None)
    exact = gradients(only(layer_norm_linear_reference), some, grads[1:2], None)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", ["both", "x", "bias"])
def test_x_carried_past_its_maps(used):
    """The gradient of what comes after x is part of its own, whichever of the two is used."""
    tensors, (grad,) = problem((6, 9), 32, 0, 0, 4, FULL, FULL)

    def run(fn, apart):
        x, gamma, beta, head = leaves = [t.clone().requires_grad_() for t in tensors]
        bias, after = (
            (*fn(x, gamma, beta, [], head), x) if apart else fn(x, gamma, beta, [], head, carried=True)
        )
        parts = {"both": [(bias, grad), (after, x.detach().cos())]}
        parts |= {"x": parts["both"][1:], "bias": parts["both"][:1]}
        outs, grads = zip(*parts[used], strict=True)
        return torch.autograd.grad(outs, leaves, grads, allow_unused=True)

    for ours, exact in zip(
        run(layer_norm_linear, False), run(layer_norm_linear_reference, True), strict=True
    ):
        if exact is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_what_is_carried_is_x():
    x, gamma, beta, head = problem((6, 9), 32, 0, 0, 4, FULL, FULL)[0]
    _, after = layer_norm_linear(x, gamma, beta.requires_grad_(), [], head, carried=True)
    assert after is x  # which asks for no gradient
    _, after = layer_norm_linear(x.requires_grad_(), gamma, beta, [], head, carried=True)
    assert after.data_ptr() == x.data_ptr()
    after.mul_(2.0)  # allowed as of any tensor, and noticed as of any that is kept
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        after.sum().backward()


def test_results_are_contiguous_heads():
    tensors, _ = problem((4, 6), 32, 32, 4, 4, BF, FULL)
    *wide, bias = split(layer_norm_linear, 4)(*tensors)
    assert all(y.unflatten(-1, (4, 8)).stride() == (192, 32, 8, 1) for y in wide)
    assert bias.shape == (4, 4, 6) and bias.is_contiguous()


def test_fake_tensors_and_registration():
    tensors, _ = problem((4, 5), 16, 16, 2, 4, BF, FULL)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        outs = torch.ops.megafold_bench.layer_norm_linear(*fake[:3], fake[3:5], fake[5], 1e-5, BF)
    assert [tuple(y.shape) for y in outs] == [(4, 5, 16), (4, 5, 16), (4, 4, 5)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(
        torch.ops.megafold_bench.layer_norm_linear.default,
        (*leaves[:3], leaves[3:5], leaves[5], 1e-5, BF),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_definition_runs_where_the_kernels_do_not():
    tensors, _ = problem((4, 5), 16, 16, 5, 0, FULL, FULL)
    verdict = supported(*tensors[:3], tensors[3:])
    assert not verdict.ok and "at most 4" in verdict.reason
    results = layer_norm_linear(*tensors[:3], tensors[3:])
    assert len(results) == 5
