"""Linear layers in three TF32 products on a GPU: errors, repeatability, the diffusion module's widths."""

import pytest
import torch
from fused_checks import check_bitwise, distance, gradients

from optimized.ops.linear import linear, linear_reference, supported

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def problem(shape, c, h, bias=True):
    torch.manual_seed(c + h)
    tensors = [torch.randn(*shape, c, device="cuda"), torch.randn(h, c, device="cuda") / c**0.5]
    return tensors + [torch.randn(h, device="cuda")] * bias, [torch.randn(*shape, h, device="cuda")]


def ours(*tensors):
    return [linear(*tensors)]


def definition(*tensors):
    return [linear_reference(*tensors)]


@pytest.fixture(autouse=True)
def nvidia_in_float32():
    if torch.version.hip is not None:
        pytest.skip("TF32 products exist on NVIDIA only")
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("shape", "c", "h"),
    [((4, 768), 768, 768), ((4, 301), 384, 1536), ((2, 6144), 128, 256), ((3, 77), 833, 384)],
)
def test_errors_against_fp64(shape, c, h):
    """A few times float32's at most; those of one TF32 product are a thousand times larger."""
    tensors, grads = problem(shape, c, h)
    assert supported(*tensors).ok
    found, eager = (gradients(fn, tensors, grads, None) for fn in (ours, definition))
    exact = gradients(definition, tensors, grads, torch.float64)
    for index, (a, e, x) in enumerate(zip(found, eager, exact, strict=True)):
        assert distance(a, x) <= 3 * distance(e, x), f"result {index}: {distance(a, x)}, {distance(e, x)}"


def test_repeats_bit_for_bit():
    check_bitwise(ours, *problem((4, 768), 768, 768), times=20)


def test_more_than_two_to_the_31_elements():
    x = torch.randn(1 << 24, 128, device="cuda")
    weight = torch.randn(128, 128, device="cuda") / 11
    y = linear(x, weight)
    rows = [0, 12345, (1 << 24) - 1]
    torch.testing.assert_close(y[rows], x[rows] @ weight.t(), rtol=1e-4, atol=1e-4)
