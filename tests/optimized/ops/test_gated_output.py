import pytest
import torch
from fused_checks import check_against_definition, check_bitwise
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.gated_output import (
    add_update,
    add_update_reference,
    conditioned_output,
    conditioned_output_reference,
    conditioned_supported,
    gated_output,
    gated_output_reference,
    supported,
    update_supported,
)
from optimized.ops.gated_output.launch import Keep

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def factors(shape, shared, dtype):
    """Dropout factors with one value for all of axis `shared`, -3 (rows) or -2 (columns)."""
    if shared is None:
        return None
    sizes = list(shape)
    sizes[shared] = 1
    return ((torch.rand(sizes) > 0.3) / 0.75).to(dtype)


def problem(lead, h, c, shared, residual, dtype, parameter_dtype):
    torch.manual_seed(h + c)
    x, g = torch.randn(*lead, h).to(dtype), torch.randn(*lead, h).to(dtype)
    tensors = [x, g, (torch.randn(c, h) / h**0.5).to(parameter_dtype)]
    if residual is not None:
        tensors.append(torch.randn(*lead, c).to(residual))
    return tensors, [torch.randn(*lead, c).to(dtype)], factors((*lead, c), shared, dtype)


def pair(keep):
    return (
        lambda x, g, w, r=None: [gated_output(x, g, w, r, keep)],
        lambda x, g, w, r=None: [gated_output_reference(x, g, w, r, keep)],
    )


@pytest.mark.parametrize(
    ("lead", "h", "c", "shared", "residual", "dtype", "parameter_dtype"),
    [
        ((5, 7), 24, 32, -3, FULL, FULL, FULL),
        ((5, 7), 32, 16, -2, FULL, FULL, FULL),
        ((9, 11), 128, 128, -3, BF, BF, FULL),
        ((2, 5, 7), 32, 32, -2, FULL, BF, FULL),
        ((5, 13), 64, 64, -3, None, HALF, FULL),
        ((3, 7), 192, 64, None, BF, BF, BF),
        ((17,), 384, 384, None, BF, BF, FULL),
        ((4, 5), 272, 48, -3, HALF, HALF, HALF),
        ((1, 1), 16, 16, None, None, FULL, FULL),
    ],
)
def test_errors_against_fp64(lead, h, c, shared, residual, dtype, parameter_dtype):
    tensors, grads, keep = problem(lead, h, c, shared, residual, dtype, parameter_dtype)
    assert supported(*tensors, *([None] if residual is None else []), keep).ok
    check_against_definition(*pair(keep), tensors, grads)


@pytest.mark.parametrize("shared", [-3, -2, None])
@pytest.mark.parametrize(("residual", "dtype"), [(FULL, FULL), (BF, BF), (FULL, BF)])
def test_update_errors_against_fp64(shared, residual, dtype):
    torch.manual_seed(0)
    z, u, grad = (torch.randn(7, 11, 24).to(d) for d in (residual, dtype, residual))
    keep = factors(u.shape, shared, dtype)
    assert update_supported(z, u, keep).ok
    check_against_definition(
        lambda z, u: [add_update(z, u, keep)],
        lambda z, u: [add_update_reference(z, u, keep)],
        [z, u],
        [grad],
    )


def conditioned_problem(lead, own, h, c_s, dtype, parameter_dtype):
    torch.manual_seed(h + c_s)
    tensors = [torch.randn(*lead, h), torch.randn(*lead, h), torch.randn(h, h) / h**0.5]
    tensors += [torch.randn(*own, c_s), torch.randn(h, c_s) / c_s**0.5, torch.randn(h) - 1]
    dtypes = [dtype, dtype, parameter_dtype, dtype, parameter_dtype, parameter_dtype]
    return [t.to(d) for t, d in zip(tensors, dtypes, strict=True)], [torch.randn(*lead, h).to(dtype)]


def conditioned(*tensors):
    return [conditioned_output(*tensors)]


@pytest.mark.parametrize(
    ("lead", "own", "h", "c_s", "dtype", "parameter_dtype"),
    [
        ((3, 7), (3, 7), 48, 24, FULL, FULL),
        ((3, 7), (7,), 32, 32, BF, FULL),
        ((2, 5), (2, 5), 768, 384, BF, FULL),
        ((4, 9), (1, 9), 64, 32, HALF, HALF),
    ],
)
def test_conditioned_errors_against_fp64(lead, own, h, c_s, dtype, parameter_dtype):
    tensors, grads = conditioned_problem(lead, own, h, c_s, dtype, parameter_dtype)
    assert conditioned_supported(*tensors).ok
    check_against_definition(conditioned, lambda *t: [conditioned_output_reference(*t)], tensors, grads)


def test_gradients_repeat_bit_for_bit():
    tensors, grads, keep = problem((9, 31), 32, 32, -3, BF, BF, FULL)
    check_bitwise(pair(keep)[0], tensors, grads, times=4)
    check_bitwise(conditioned, *conditioned_problem((4, 37), (37,), 32, 16, BF, FULL), times=4)


def test_strided_inputs_and_gradient():
    tensors, grads, keep = problem((6, 10), 32, 32, -3, BF, BF, FULL)
    turned = [t.transpose(0, 1) if t.dim() == 3 else t for t in tensors]
    check_against_definition(*pair(keep.transpose(0, 1)), turned, [grads[0].transpose(0, 1)])


def test_the_residual_gets_the_gradient_as_it_is():
    tensors, grads, keep = problem((6, 10), 32, 32, -3, BF, BF, FULL)
    leaves = [t.requires_grad_() for t in tensors]
    gated_output(*leaves, keep).backward(grads[0])
    assert torch.equal(leaves[3].grad, grads[0])


def test_autocast_runs_the_product_in_its_dtype():
    tensors, _, keep = problem((5, 7), 32, 16, -2, FULL, FULL, FULL)
    with torch.autocast("cpu", dtype=BF):
        assert gated_output(*tensors[:3]).dtype == BF
        y = gated_output(*tensors, keep)
    assert y.dtype == FULL
    torch.testing.assert_close(y, gated_output_reference(*tensors, keep), rtol=0.05, atol=0.05)


def test_fake_tensors_and_registration():
    tensors, _, keep = problem((4, 5), 32, 16, -3, FULL, BF, FULL)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*tensors, keep)]
        y = torch.ops.megafold_bench.gated_output(*fakes, BF)
    assert y.shape == (4, 5, 16) and y.dtype == FULL
    leaves = [t.clone().requires_grad_() for t in tensors]
    ops = torch.ops.megafold_bench
    torch.library.opcheck(ops.gated_output.default, (*leaves, keep, BF), test_utils=CHECKS)
    update = torch.randn(4, 5, 16, dtype=BF, requires_grad=True)
    torch.library.opcheck(ops.add_update.default, (leaves[3], update, keep), test_utils=CHECKS)
    tensors, _ = conditioned_problem((3, 5), (5,), 16, 8, BF, FULL)
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(ops.conditioned_output.default, (*leaves, BF), test_utils=CHECKS)


def test_definition_runs_where_the_kernels_do_not():
    tensors, _, keep = problem((4, 5), 32, 16, -3, FULL, FULL, FULL)
    assert "a gate [4, 1, 32]" in supported(tensors[0], tensors[1][:, :1], tensors[2]).reason
    assert "dropout factors [5]" in supported(*tensors, keep[0, :, 0]).reason
    assert "a residual [16]" in supported(*tensors[:3], tensors[3][0, 0]).reason
    y = gated_output(tensors[0], tensors[1][:, :1], tensors[2])
    torch.testing.assert_close(y, gated_output_reference(tensors[0], tensors[1][:, :1], tensors[2]))


@pytest.mark.parametrize("shared", [-2, -3])
def test_factors_without_channels_are_not_spread_out(shared):
    """As Boltz draws them: one for all channels, in float32. A copy for every position would be as large as the update."""
    shape = torch.Size((1, 6, 9, 32))
    keep = factors((*shape[:-1], 1), shared, FULL)
    assert Keep.of(keep, shape, keep).values.untyped_storage().nbytes() <= 4 * 9 * 32
    z, u = torch.randn(shape), torch.randn(shape).to(BF)
    torch.testing.assert_close(add_update(z, u, keep), z + keep * u)
