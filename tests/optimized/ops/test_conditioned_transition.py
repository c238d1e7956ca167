import pytest
import torch
from fused_checks import check_against_definition, check_bitwise
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.conditioned_transition import (
    ConditionedWeights,
    conditioned_transition,
    conditioned_transition_reference,
    supported,
)

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def problem(lead, own, c_a, c_s, hidden, dtype, parameter_dtype):
    torch.manual_seed(c_a + c_s)
    a, s = (torch.randn(*lead, c_a) * 2 + 0.3).to(dtype), (torch.randn(*own, c_s) + 0.2).to(dtype)

    def matrix(rows, columns):
        return torch.randn(rows, columns) / columns**0.5

    weights = ConditionedWeights(
        1 + 0.2 * torch.randn(c_s), matrix(c_a, c_s), 0.5 * torch.randn(c_a), matrix(c_a, c_s),
        matrix(hidden, c_a), matrix(hidden, c_a), matrix(c_a, hidden), matrix(c_a, c_s), torch.randn(c_a) - 1,
    )  # fmt: skip
    return [a, s, *(w.to(parameter_dtype) for w in weights)], [torch.randn(*lead, c_a).to(dtype)]


def ours(a, s, *weights):
    return [conditioned_transition(a, s, ConditionedWeights(*weights))]


def definition(a, s, *weights):
    return [conditioned_transition_reference(a, s, ConditionedWeights(*weights))]


@pytest.mark.parametrize(
    ("lead", "own", "c_a", "c_s", "hidden", "dtype", "parameter_dtype"),
    [
        ((3, 7), (3, 7), 48, 24, 96, FULL, FULL),
        ((3, 7), (7,), 32, 32, 64, FULL, FULL),
        ((2, 11), (11,), 32, 16, 64, BF, FULL),
        ((5,), (5,), 40, 24, 80, HALF, FULL),
        ((2, 33), (33,), 128, 128, 256, BF, BF),
        ((2, 5), (2, 5), 768, 384, 1536, BF, FULL),
        ((1, 1), (1, 1), 16, 16, 32, FULL, FULL),
        ((2, 9), (9,), 96, 48, 192, HALF, HALF),
    ],
)
def test_errors_against_fp64(lead, own, c_a, c_s, hidden, dtype, parameter_dtype):
    tensors, grads = problem(lead, own, c_a, c_s, hidden, dtype, parameter_dtype)
    assert supported(tensors[0], tensors[1], ConditionedWeights(*tensors[2:])).ok
    check_against_definition(ours, definition, tensors, grads)


def test_gradients_repeat_bit_for_bit():
    check_bitwise(ours, *problem((4, 37), (37,), 64, 32, 128, BF, FULL), times=4)


def test_strided_input_and_gradient():
    tensors, grads = problem((6, 10), (6, 10), 32, 16, 64, BF, FULL)
    tensors[0], tensors[1], grads[0] = (t.transpose(0, 1) for t in (tensors[0], tensors[1], grads[0]))
    check_against_definition(ours, definition, tensors, grads)


def test_autocast_runs_the_products_in_its_dtype():
    tensors, _ = problem((5, 7), (7,), 32, 16, 64, FULL, FULL)
    with torch.autocast("cpu", dtype=BF):
        (y,) = ours(*tensors)
    assert y.dtype == BF
    torch.testing.assert_close(y.float(), definition(*tensors)[0], rtol=0.05, atol=0.05)


def test_fake_tensors_and_registration():
    tensors, _ = problem((3, 5), (5,), 32, 16, 64, BF, FULL)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        y, _, u, _ = torch.ops.megafold_bench.conditioned_transition(*fakes, 1e-5, BF)
    assert y.shape == (3, 5, 32) and y.dtype == BF and u.shape == (15, 128)
    leaves = [t.clone().requires_grad_() for t in tensors]
    op = torch.ops.megafold_bench.conditioned_transition.default
    torch.library.opcheck(op, (*leaves, 1e-5, BF), test_utils=CHECKS)


def test_definition_runs_where_the_kernels_do_not():
    tensors, _ = problem((5, 7), (5, 1), 16, 8, 32, FULL, FULL)
    verdict = supported(tensors[0], tensors[1], ConditionedWeights(*tensors[2:]))
    assert not verdict.ok and "does not repeat" in verdict.reason
    torch.testing.assert_close(ours(*tensors), definition(*tensors))
