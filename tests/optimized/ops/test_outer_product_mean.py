import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, parameters
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.outer_product_mean import (
    OuterWeights,
    launch,
    outer_product_mean,
    outer_product_mean_reference,
    projected_outer,
    projected_outer_reference,
    supported,
)

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def problem(rows, n, c_m, c, c_z, dtype, parameter_dtype):
    torch.manual_seed(rows + n + c)
    shapes = [(c_m,), (c_m,), (c, c_m), (c, c_m), (c_z, c * c)]
    weights = [*parameters(shapes, FULL), 0.3 * torch.randn(c_z)]
    mask = torch.rand(rows, n) > 0.3
    mask[:, -1] = False  # a token that no row has
    m = (torch.randn(rows, n, c_m) * 2 + 0.3).to(dtype)
    tensors = [m, *(w.to(parameter_dtype) for w in weights)]
    return tensors, [torch.randn(n, n, c_z).to(dtype)], mask


def pair(mask):
    return (
        lambda m, *w: [outer_product_mean(m, mask, OuterWeights(*w))],
        lambda m, *w: [outer_product_mean_reference(m, mask, OuterWeights(*w))],
    )


@pytest.fixture(params=["whole", "in blocks"])
def _blocks(request, monkeypatch):
    """Blocks of a few tokens, as long inputs have them."""
    if request.param == "in blocks":
        monkeypatch.setattr(launch, "BLOCK_BYTES", 2**13)
        monkeypatch.setattr(launch, "GRADIENT_BYTES", 2**14)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(
    ("rows", "n", "c_m", "c", "c_z", "dtype", "parameter_dtype"),
    [
        (7, 11, 16, 8, 16, FULL, FULL),
        (5, 9, 24, 16, 40, FULL, FULL),
        (19, 6, 64, 32, 128, BF, FULL),
        (6, 10, 32, 8, 32, HALF, FULL),
        (9, 7, 64, 16, 48, BF, BF),
    ],
)
def test_errors_against_fp64(rows, n, c_m, c, c_z, dtype, parameter_dtype):
    tensors, grads, mask = problem(rows, n, c_m, c, c_z, dtype, parameter_dtype)
    assert supported(tensors[0], mask, OuterWeights(*tensors[1:])).ok
    check_against_definition(*pair(mask), tensors, grads)


@pytest.mark.parametrize("dtype", [FULL, BF])
def test_rectangular_blocks(dtype):
    """Rows i and columns j of different number and width, as a shard of the pair has them."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 5, 8).to(dtype), torch.randn(6, 9, 16).to(dtype)
    weight, bias, scale = torch.randn(24, 128) / 11, torch.randn(24), torch.rand(5, 9) + 0.5
    check_against_definition(
        lambda *t: [projected_outer(*t, scale)],
        lambda *t: [projected_outer_reference(*t, scale)],
        [a, b, weight, bias],
        [torch.randn(5, 9, 24).to(dtype)],
    )


@pytest.mark.usefixtures("_blocks")
def test_gradients_repeat_bit_for_bit():
    tensors, grads, mask = problem(9, 17, 32, 8, 32, BF, FULL)
    check_bitwise(pair(mask)[0], tensors, grads, times=3)


def test_blocks_cover_every_token_once():
    for length, each, limit in ((13, 10, 45), (13, 10, 1), (8, 1, 100), (768, 24576 * 64, 2**25)):
        found = [first + k for first, count in launch.blocks(length, each, limit) for k in range(count)]
        assert found == list(range(length))
        assert all(n * each <= max(limit, each) for _, n in launch.blocks(length, each, limit))


def test_autocast_runs_the_products_in_its_dtype():
    tensors, _, mask = problem(5, 7, 16, 8, 16, FULL, FULL)
    with torch.autocast("cpu", dtype=BF):
        (y,) = pair(mask)[0](*tensors)
    assert y.dtype == BF
    torch.testing.assert_close(y.float(), pair(mask)[1](*tensors)[0], rtol=0.1, atol=0.1)


def test_fake_tensors_and_registration():
    torch.manual_seed(0)
    tensors = [torch.randn(4, 5, 8), torch.randn(4, 7, 8), torch.randn(16, 64), torch.randn(16)]
    scale = torch.rand(5, 7)
    op = torch.ops.megafold_bench.projected_outer
    with FakeTensorMode() as mode:
        y = op(*(mode.from_tensor(t) for t in (*tensors, scale)))
    assert y.shape == (5, 7, 16)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(op.default, (*leaves, scale), test_utils=CHECKS)


def test_definition_runs_where_the_kernels_do_not():
    tensors, _, mask = problem(3, 4, 16, 8, 272, FULL, FULL)
    verdict = supported(tensors[0], mask, OuterWeights(*tensors[1:]))
    assert not verdict.ok and "272 pair channels" in verdict.reason
    ours, definition = pair(mask)
    torch.testing.assert_close(ours(*tensors), definition(*tensors))
