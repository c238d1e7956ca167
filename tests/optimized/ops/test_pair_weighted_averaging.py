import pytest
import torch
from fused_checks import check_against_definition, check_bitwise
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.pair_weighted_averaging import supported, weighted_average, weighted_average_reference

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def problem(rows, i, j, heads, width, dtype, logits_dtype):
    """v `[rows, j, heads, width]` and logits as a projection leaves them, heads last in memory."""
    torch.manual_seed(rows + i + j)
    v = torch.randn(rows, j, heads, width).to(dtype)
    logits = (2 * torch.randn(i, j, heads)).to(logits_dtype).movedim(-1, 0)
    return [v, logits], [torch.randn(rows, i, heads, width).to(dtype)]


def pair(mask):
    return (
        lambda v, logits: [weighted_average(v, logits, mask)],
        lambda v, logits: [weighted_average_reference(v, logits, mask)],
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "i", "j", "heads", "width", "dtype", "logits_dtype"),
    [
        (5, 11, 11, 2, 8, FULL, FULL),
        (3, 7, 7, 8, 32, BF, BF),
        (7, 5, 9, 3, 16, HALF, FULL),
        (2, 133, 133, 1, 8, FULL, FULL),
        (2, 6, 6, 2, 64, BF, FULL),
    ],
)
def test_errors_against_fp64(rows, i, j, heads, width, dtype, logits_dtype, masked):
    tensors, grads = problem(rows, i, j, heads, width, dtype, logits_dtype)
    mask = torch.arange(j) % 3 != 1 if masked else None
    assert supported(*tensors, mask).ok
    check_against_definition(*pair(mask), tensors, grads)


def test_weights_past_one_step_of_keys():
    check_against_definition(*pair(None), *problem(3, 4, 300, 2, 8, BF, BF))


def test_gradients_repeat_bit_for_bit():
    check_bitwise(pair(None)[0], *problem(19, 40, 40, 2, 8, BF, BF), times=3)


def test_without_keys_the_average_is_zero():
    tensors, grads = problem(3, 5, 5, 2, 8, FULL, FULL)
    for fn in pair(torch.zeros(5, dtype=torch.bool)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        (o,) = fn(*leaves)
        o.backward(grads[0])
        assert not o.any() and not leaves[0].grad.any() and not leaves[1].grad.any()


def test_fake_tensors_and_registration():
    tensors, _ = problem(3, 5, 7, 2, 8, BF, FULL)
    op = torch.ops.megafold_bench.weighted_average
    with FakeTensorMode() as mode:
        o, w, _ = op(*(mode.from_tensor(t) for t in tensors), None)
    assert o.shape == (3, 5, 2, 8) and w.shape == (2, 5, 16)
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(op.default, (*leaves, None), test_utils=CHECKS)


def test_definition_runs_where_the_kernels_do_not():
    tensors, _ = problem(3, 5, 7, 2, 12, FULL, FULL)
    assert "12 channels per head" in supported(*tensors).reason
    torch.testing.assert_close(weighted_average(*tensors), weighted_average_reference(*tensors))


def test_shapes_are_checked():
    v, logits = problem(3, 5, 7, 2, 8, FULL, FULL)[0]
    with pytest.raises(ValueError, match="want v"):
        weighted_average(v, logits.transpose(1, 2))
    with pytest.raises(ValueError, match="boolean"):
        weighted_average(v, logits, torch.ones(7))
