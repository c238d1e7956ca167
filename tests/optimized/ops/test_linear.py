import pytest
import torch
from fused_checks import check_bitwise, distance, gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.linear import launch, linear, linear_reference, supported
from optimized.ops.tuning import Config

SMALL = Config({"BM": 16, "BN": 16, "BK": 16, "STAGES": 1}, 4)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "chosen", lambda *_: SMALL)


def problem(shape, c, h, bias):
    torch.manual_seed(c + h)
    tensors = [torch.randn(*shape, c), torch.randn(h, c) / c**0.5]
    return tensors + [torch.randn(h)] * bias, [torch.randn(*shape, h)]


def ours(*tensors):
    return [linear(*tensors)]


def definition(*tensors):
    return [linear_reference(*tensors)]


@pytest.mark.parametrize(
    ("shape", "c", "h", "bias"),
    [((5, 7), 64, 96, False), ((33,), 96, 64, True), ((2, 3, 5), 72, 80, True), ((1,), 64, 64, False)],
)
def test_errors_against_fp64(shape, c, h, bias):
    """Near float32's; those of one TF32 product are three orders larger."""
    tensors, grads = problem(shape, c, h, bias)
    assert supported(*tensors).ok
    found, eager = (gradients(fn, tensors, grads, None) for fn in (ours, definition))
    exact = gradients(definition, tensors, grads, torch.float64)
    for a, e, x in zip(found, eager, exact, strict=True):
        assert a.shape == x.shape and a.dtype == torch.float32
        assert distance(a, x) <= max(3 * distance(e, x), 2e-7)


def test_repeats_bit_for_bit():
    check_bitwise(ours, *problem((70,), 64, 64, False), times=3)


def test_strided_input():
    tensors, grads = problem((6, 8), 64, 64, True)
    wide = torch.randn(6, 8, 128)
    wide[..., 32:96] = tensors[0]
    (found,) = ours(wide[..., 32:96], *tensors[1:])
    assert torch.equal(found, ours(*tensors)[0])
    turned = tensors[0].transpose(0, 1)
    # Rows in another place of a tile: the interpreter's library may round them otherwise, by machine.
    torch.testing.assert_close(ours(turned, *tensors[1:])[0], found.transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert grads[0].shape == found.shape


def test_no_gradient_of_the_input():
    tensors, grads = problem((6,), 64, 64, True)
    weight = tensors[1].requires_grad_()
    linear(tensors[0], weight, tensors[2]).backward(grads[0])
    torch.testing.assert_close(weight.grad, grads[0].t() @ tensors[0], rtol=1e-5, atol=1e-5)


def test_what_it_does_not_take():
    x, w = torch.randn(3, 64), torch.randn(64, 64)
    assert "float32" in supported(x.bfloat16(), w).reason
    assert "64 on" in supported(torch.randn(3, 16), torch.randn(64, 16)).reason
    assert "empty" in supported(x[:0], w).reason
    with torch.autocast("cpu", torch.bfloat16):
        assert "float32" in supported(x, w).reason
        assert linear(x, w).dtype == torch.bfloat16


def test_registered_operators():
    tensors, _ = problem((5,), 64, 64, True)
    leaves = [t.requires_grad_() for t in tensors]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megafold_bench.linear_tf32x3, leaves, test_utils=checks)
    plain = [t.detach() for t in tensors]
    with FakeTensorMode() as mode:
        out = linear(*(mode.from_tensor(t) for t in plain))
    assert out.shape == (5, 64)
