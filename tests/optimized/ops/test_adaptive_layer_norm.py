import pytest
import torch
from fused_checks import check_against_definition, check_bitwise
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.adaptive_layer_norm import (
    adaptive_layer_norm,
    adaptive_layer_norm_reference,
    supported,
)

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def problem(lead, own, c_a, c_s, dtype, parameter_dtype):
    """a `[*lead, c_a]` and s `[*own, c_s]` with parameters away from their initial zeros."""
    torch.manual_seed(c_a + c_s)
    a, s = (torch.randn(*lead, c_a) * 2 + 0.3).to(dtype), (torch.randn(*own, c_s) + 0.2).to(dtype)
    weights = [
        1 + 0.2 * torch.randn(c_s),
        torch.randn(c_a, c_s) / c_s**0.5,
        0.5 * torch.randn(c_a) - 1,
        torch.randn(c_a, c_s) / c_s**0.5,
    ]
    return [a, s, *(w.to(parameter_dtype) for w in weights)], [torch.randn(*lead, c_a).to(dtype)]


def ours(*tensors):
    return [adaptive_layer_norm(*tensors)]


def definition(*tensors):
    return [adaptive_layer_norm_reference(*tensors)]


@pytest.mark.parametrize(
    ("lead", "own", "c_a", "c_s", "dtype", "parameter_dtype"),
    [
        ((5, 7), (5, 7), 48, 24, FULL, FULL),
        ((3, 7), (7,), 32, 32, FULL, FULL),
        ((3, 7), (1, 7), 32, 16, BF, FULL),
        ((2, 3, 5), (3, 5), 40, 24, HALF, FULL),
        ((2, 67), (67,), 128, 128, BF, BF),
        ((2, 5), (2, 5), 768, 384, BF, FULL),
        ((1,), (1,), 16, 16, BF, FULL),
        ((6,), (6,), 96, 48, HALF, HALF),
    ],
)
def test_errors_against_fp64(lead, own, c_a, c_s, dtype, parameter_dtype):
    tensors, grads = problem(lead, own, c_a, c_s, dtype, parameter_dtype)
    assert supported(*tensors).ok
    check_against_definition(ours, definition, tensors, grads)


def test_gradients_repeat_bit_for_bit():
    check_bitwise(ours, *problem((4, 37), (37,), 64, 32, BF, FULL), times=4)


def test_strided_input_and_gradient():
    tensors, grads = problem((6, 10), (6, 10), 32, 16, BF, FULL)
    tensors[0], tensors[1], grads[0] = (t.transpose(0, 1) for t in (tensors[0], tensors[1], grads[0]))
    check_against_definition(ours, definition, tensors, grads)


def test_autocast_runs_the_products_in_its_dtype():
    tensors, _ = problem((5, 7), (7,), 32, 16, FULL, FULL)
    with torch.autocast("cpu", dtype=BF):
        y = adaptive_layer_norm(*tensors)
    assert y.dtype == BF
    torch.testing.assert_close(y.float(), adaptive_layer_norm_reference(*tensors), rtol=0.05, atol=0.05)


def test_fake_tensors_and_registration():
    tensors, _ = problem((3, 5), (5,), 32, 16, BF, FULL)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        y, p = torch.ops.megafold_bench.adaptive_layer_norm(*fakes, 1e-5, BF)
    assert y.shape == (3, 5, 32) and y.dtype == BF and p.shape == (5, 64)
    leaves = [t.clone().requires_grad_() for t in tensors]
    op = torch.ops.megafold_bench.adaptive_layer_norm.default
    torch.library.opcheck(op, (*leaves, 1e-5, BF), test_utils=CHECKS)


@pytest.mark.parametrize(
    ("lead", "own", "channels", "reason"),
    [((5, 7), (5, 1), 16, "does not repeat"), ((2,), (2,), 4096, "4096 channels")],
)
def test_definition_runs_where_the_kernels_do_not(lead, own, channels, reason):
    tensors, _ = problem(lead, own, channels, 16, FULL, FULL)
    verdict = supported(*tensors)
    assert not verdict.ok and reason in verdict.reason
    torch.testing.assert_close(adaptive_layer_norm(*tensors), adaptive_layer_norm_reference(*tensors))
