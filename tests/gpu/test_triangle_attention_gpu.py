"""Triangle attention whole, and every operator as `verify` sees it, on a real GPU."""

import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, distance, parameters

from optimized.kernels.problem import DTYPES
from optimized.kernels.problems import OPERATORS
from optimized.kernels.verify import verify
from optimized.ops.triangle_attention import (
    Orientation,
    TriangleAttentionWeights,
    triangle_attention,
    triangle_attention_reference,
)

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device is visible to torch"),
]


def weights(c, heads, width, dtype):
    h = heads * width
    return parameters([(c,), (c,), *[(h, c)] * 4, (heads, c), (c, h)], dtype, "cuda")


def calls(fn, heads, way, mask, keep):
    def run(z, residual, *parts):
        return [fn(z, TriangleAttentionWeights(*parts), heads, way, mask, residual=residual, keep=keep)]

    return run


def pair(n, c, dtype):
    return torch.randn(n, n, c, device="cuda").to(dtype)


@pytest.mark.parametrize("way", [Orientation(c, f) for c in (False, True) for f in (False, True)])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), [(BF, FULL), (BF, BF), (HALF, FULL), (FULL, FULL)])
@pytest.mark.parametrize(("n", "c", "heads", "width"), [(96, 128, 4, 32), (77, 64, 2, 16)])
def test_errors(n, c, heads, width, dtype, parameter_dtype, way):
    mask = torch.rand(n, n, device="cuda") > 0.2
    mask[3] = False
    keep = (torch.rand(1, n, c, device="cuda") > 0.5).to(dtype) * 2
    tensors = [pair(n, c, dtype), pair(n, c, dtype), *weights(c, heads, width, parameter_dtype)]
    fns = (calls(fn, heads, way, mask, keep) for fn in (triangle_attention, triangle_attention_reference))
    check_against_definition(*fns, tensors, [pair(n, c, dtype)])


@pytest.mark.parametrize("dtype", [BF, HALF, FULL])
@pytest.mark.parametrize("way", [Orientation(False, False), Orientation(True, True)])
def test_z_itself_is_the_residual(dtype, way):
    keep = (torch.rand(1, 101, 128, device="cuda") > 0.5).to(dtype) * 2

    def into_z(fn):
        return lambda z, *parts: [
            fn(z, TriangleAttentionWeights(*parts), 4, way, residual=z, keep=keep),
        ]

    fns = (into_z(triangle_attention), into_z(triangle_attention_reference))
    check_against_definition(
        *fns, [pair(101, 128, dtype), *weights(128, 4, 32, FULL)], [pair(101, 128, dtype)]
    )


def test_hundred_repeats_are_bitwise_equal():
    tensors = [pair(90, 128, BF), pair(90, 128, BF), *weights(128, 4, 32, FULL)]
    fn = calls(triangle_attention, 4, Orientation(True, True), None, None)
    check_bitwise(fn, tensors, [pair(90, 128, BF)], times=100)


def test_past_two_to_the_31_elements():
    n, c, heads, rows = 4112, 128, 4, 4
    z = pair(n, c, BF)
    w = TriangleAttentionWeights(*weights(c, heads, 32, BF))
    with torch.no_grad():
        y = triangle_attention(z, w, heads, Orientation(False, False))[-rows:]
        exact = TriangleAttentionWeights(*(t.double() for t in w))

        def norm(x):
            return torch.nn.functional.layer_norm(x.double(), (c,), exact.norm_weight, exact.norm_bias)

        bias = torch.cat([norm(part) @ exact.bias.T for part in z.split(64)]).movedim(-1, 0)
        last = norm(z[-rows:])
        q, k, v = ((last @ m.T).unflatten(-1, (heads, -1)).transpose(1, 2) for m in exact[2:5])
        p = torch.softmax(q @ k.transpose(-1, -2) / 32**0.5 + bias, -1)
        x = (p @ v).transpose(1, 2).flatten(-2) * torch.sigmoid(last @ exact.g.T)
        assert distance(y, x @ exact.out.T) < 2e-2


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in OPERATORS for dtype in DTYPES if op != "linear" or dtype == "fp32"],
)
def test_verified(op, dtype):
    verdict = verify(op, dtype, "cuda")
    assert verdict["passed"], verdict
