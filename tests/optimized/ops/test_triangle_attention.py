import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, gradients, parameters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from optimized.ops.triangle_attention import (
    Orientation,
    TriangleAttentionWeights,
    supported,
    triangle_attention,
    triangle_attention_reference,
)

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
ROWS, COLUMNS = Orientation(False, False), Orientation(True, False)
TURNED_ROWS, TURNED_COLUMNS = Orientation(False, True), Orientation(True, True)


def problem(lead, n, c, heads, width, dtype, parameter_dtype, into=False):
    """z, with `into` a residual, and the eight parameters; the gradient of the result."""
    torch.manual_seed(n + c)
    h = heads * width
    shapes = [(c,), (c,), *[(h, c)] * 4, (heads, c), (c, h)]
    z = (torch.randn(*lead, n, n, c) * 1.5 + 0.2).to(dtype)
    residual = torch.randn(*lead, n, n, c).to(dtype)
    residuals = [residual] if into else []
    return [z, *residuals, *parameters(shapes, parameter_dtype)], [torch.randn(*lead, n, n, c).to(dtype)]


def calls(fn, heads, way, mask=None, keep=None, into=False):
    def run(z, *rest):
        residual, *weights = rest if into else (None, *rest)
        return [fn(z, TriangleAttentionWeights(*weights), heads, way, mask, residual=residual, keep=keep)]

    return run


def both(*args, **options):
    return calls(triangle_attention, *args, **options), calls(triangle_attention_reference, *args, **options)


@pytest.mark.parametrize(
    ("lead", "n", "c", "heads", "width", "way", "dtype", "parameter_dtype"),
    [
        ((), 7, 16, 2, 8, ROWS, FULL, FULL),
        ((), 9, 24, 2, 16, TURNED_COLUMNS, FULL, FULL),
        ((2,), 9, 32, 2, 24, COLUMNS, BF, BF),
        ((), 11, 32, 2, 16, TURNED_ROWS, BF, FULL),
        ((), 6, 64, 2, 32, COLUMNS, HALF, FULL),
    ],
)
def test_errors_against_fp64(lead, n, c, heads, width, way, dtype, parameter_dtype):
    tensors, grads = problem(lead, n, c, heads, width, dtype, parameter_dtype)
    check_against_definition(*both(heads, way), tensors, grads)


def test_what_values_have_in_common_costs_no_accuracy():
    """With an offset, all values of a row have a part in common, and so has o: its rounding is that part's, and times do
    it is what a row's gradients to the logits would be off by, all alike, where the definition's sum to zero."""
    tensors, grads = problem((), 24, 16, 2, 16, BF, FULL)
    tensors[2] += 2.0
    check_against_definition(*both(2, ROWS), tensors, grads)


@pytest.mark.parametrize("way", [ROWS, COLUMNS, TURNED_COLUMNS])
def test_masked_keys_dropout_and_residual(way):
    tensors, grads = problem((), 8, 16, 2, 8, FULL, FULL, into=True)
    mask = torch.rand(8, 8) > 0.3
    mask[2] = False
    mask[:, 5] = False
    keep = (torch.rand(1, 8, 16) > 0.25) / 0.75
    ours, definition = both(2, way, mask, keep, into=True)
    check_against_definition(ours, definition, tensors, grads)


def test_autocast_with_a_wide_residual():
    """bf16 products from fp32 parameters and pair; the result keeps the residual's dtype."""
    tensors, grads = problem((), 9, 32, 2, 16, FULL, FULL, into=True)
    ours, definition = both(2, ROWS, into=True)
    with torch.autocast("cpu", BF):
        found = gradients(ours, tensors, grads, None)
    exact = gradients(definition, tensors, grads, torch.float64)
    assert found[0].dtype == FULL
    for a, x in zip(found, exact, strict=True):
        assert ((a.double() - x).norm() / x.norm()).item() < 0.02


@pytest.mark.parametrize(("way", "dtype"), [(ROWS, FULL), (TURNED_COLUMNS, BF)])
def test_z_itself_is_the_residual(way, dtype):
    """Its gradients by way of the update and past it leave the kernel as one, rounded once."""
    tensors, grads = problem((2,), 9, 32, 2, 16, dtype, FULL)
    keep = (torch.rand(2, 9, 1, 32) > 0.25) / 0.75

    def into_z(fn):
        return lambda z, *weights: [fn(z, TriangleAttentionWeights(*weights), 2, way, None, 1e-5, z, keep)]

    check_against_definition(into_z(triangle_attention), into_z(triangle_attention_reference), tensors, grads)


def test_z_itself_is_the_residual_under_autocast():
    """z and its gradient stay in float32: what is past the update is exact."""
    tensors, grads = problem((), 9, 32, 2, 16, FULL, FULL)

    def into(residual):
        def run(z, *weights):
            chosen = z if residual is None else residual
            return [triangle_attention(z, TriangleAttentionWeights(*weights), 2, ROWS, None, 1e-5, chosen)]

        return run

    with torch.autocast("cpu", BF):
        whole = gradients(into(None), tensors, grads, None)
        update = gradients(into(tensors[0]), tensors, grads, None)
    assert torch.equal(whole[0], update[0])
    torch.testing.assert_close(whole[1], update[1] + grads[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], update[2:], strict=True))


def test_gradients_repeat_bit_for_bit():
    tensors, grads = problem((), 7, 16, 2, 8, BF, FULL, into=True)
    check_bitwise(both(2, COLUMNS, into=True)[0], tensors, grads, times=2)


def test_little_is_kept_for_the_backward_pass():
    """z, the parameters, the output of the attention and its log-sum-exp: not the five projections."""
    tensors, _ = problem((), 8, 16, 2, 8, FULL, FULL)
    leaves = [t.requires_grad_() for t in tensors]
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        triangle_attention(leaves[0], TriangleAttentionWeights(*leaves[1:]), 2, ROWS)
    sizes = sorted(t.numel() for t in kept if t.numel() > 16 * 16)
    assert sizes == [leaves[0].numel(), leaves[0].numel()]  # z, and the attention's output of the same size


class _Zeros(TorchDispatchMode):
    """The sizes of tensors of zeros that are made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zeros" in str(func):
            self.sizes.append(out.numel())
        return out


def test_backward_makes_no_zeros_for_what_nobody_differentiates():
    """The attention's output and its log-sum-exp are results of the operator too, without gradients."""
    tensors, grads = problem((), 8, 16, 2, 8, FULL, FULL)
    leaves = [t.requires_grad_() for t in tensors]
    with _Zeros() as seen:
        y = triangle_attention(leaves[0], TriangleAttentionWeights(*leaves[1:]), 2, ROWS)
        torch.autograd.grad(y, leaves, grads)
    assert not seen.sizes


def test_fake_tensors_and_registration():
    tensors, _ = problem((2,), 5, 32, 2, 16, BF, FULL, into=True)
    keep = (torch.rand(1, 5, 32) > 0.25) / 0.75
    call = (tensors[0], None, tensors[1], keep, *tensors[2:], 2, True, True, 1e-5, BF)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in call]
        outs = torch.ops.megafold_bench.triangle_attention(*fake)
    real = torch.ops.megafold_bench.triangle_attention(*call)
    for a, b in zip(outs, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a is not keep else a for a in call]
    torch.library.opcheck(
        torch.ops.megafold_bench.triangle_attention.default,
        leaves,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_what_no_kernel_takes_runs_the_definition():
    tensors, grads = problem((), 6, 20, 2, 10, FULL, FULL)
    ours, definition = both(2, ROWS)
    for a, b in zip(*(gradients(fn, tensors, grads, None) for fn in (ours, definition)), strict=True):
        assert torch.equal(a, b)
    z, *weights = tensors
    verdict = supported(z, TriangleAttentionWeights(*weights), 2)
    assert verdict.reason == "head size 10 is not one of 8, 16, 24, 32, 48, 64"
    z, *weights = problem((), 6, 16, 2, 8, FULL, FULL)[0]
    verdict = supported(z, TriangleAttentionWeights(*weights), 2, torch.ones(6, 6))
    assert "it must be boolean" in verdict.reason
