import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, gradients, parameters
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops.triangle_multiplication import (
    JointWeights,
    TriangleWeights,
    supported,
    triangle_multiplication,
    triangle_multiplication_reference,
)
from optimized.ops.triangle_multiplication import launch as launches

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


def problem(tokens, channels, hidden, dtype, parameter_dtype, masked=False):
    torch.manual_seed(tokens + channels)
    c, h = (channels,), (hidden,)
    weights = parameters(
        [c, c, *[(hidden, channels)] * 4, h, h, (channels, hidden), (channels, channels)], parameter_dtype
    )
    z = (torch.randn(tokens, tokens, channels) * 2 + 0.3).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(tokens, tokens) > 0.25
        mask[tokens // 2] = False
    return [z, *weights], [torch.randn(tokens, tokens, channels).to(dtype)], mask


def pair(outgoing, mask):
    def ours(z, *weights):
        return [triangle_multiplication(z, TriangleWeights(*weights), outgoing, mask)]

    def definition(z, *weights):
        return [triangle_multiplication_reference(z, TriangleWeights(*weights), outgoing, mask)]

    return ours, definition


@pytest.mark.parametrize("outgoing", [True, False])
@pytest.mark.parametrize(
    ("tokens", "channels", "hidden", "dtype", "parameter_dtype", "masked"),
    [
        (9, 16, 16, FULL, FULL, True),
        (17, 24, 32, BF, FULL, True),
        (16, 32, 32, BF, BF, False),
        (11, 32, 16, HALF, FULL, True),
        # One pair: so few results that a draw decides; over 24 draws their errors are 0.8 of the definition's.
        (1, 32, 32, HALF, HALF, False),
        (13, 64, 16, FULL, FULL, False),
    ],
)
def test_errors_against_fp64(outgoing, tokens, channels, hidden, dtype, parameter_dtype, masked):
    tensors, grads, mask = problem(tokens, channels, hidden, dtype, parameter_dtype, masked)
    assert supported(tensors[0], TriangleWeights(*tensors[1:]), mask).ok
    check_against_definition(*pair(outgoing, mask), tensors, grads)


@pytest.mark.parametrize("masked", [True, False])
def test_tiles_that_lie_in_one_row_each(masked):
    """At a multiple of the tile's positions nothing is divided, compared or masked position by position."""
    tensors, grads, mask = problem(64, 16, 16, BF, FULL, masked)
    check_against_definition(*pair(True, mask), tensors, grads)


@pytest.mark.parametrize("dtype", [BF, HALF])
def test_means_larger_than_the_deviation_cost_no_accuracy(dtype):
    """The raw input is multiplied before its mean is taken off the product."""
    tensors, grads, mask = problem(18, 32, 16, dtype, FULL, True)
    tensors[0] = (torch.randn(18, 18, 32) + 3.0).to(dtype)
    check_against_definition(*pair(False, mask), tensors, grads)


@pytest.mark.parametrize("beforehand", [True, False])
@pytest.mark.parametrize("tokens", [17, 16])
def test_inputs_in_another_dtype_than_the_products(tokens, beforehand, monkeypatch):
    """Under autocast the input is normalised before it is rounded: beforehand on Hopper, in the kernels elsewhere."""
    if not beforehand:
        monkeypatch.setattr(launches, "folds_output", lambda z, hidden, dtype: False)
        monkeypatch.setattr(launches, "normalises", lambda z, hidden, dtype: False)
    tensors, grads, mask = problem(tokens, 24, 16, FULL, FULL, True)
    assert launches.normalises(tensors[0], 16, BF) == beforehand and not launches.folds(tensors[0], BF)

    def cast(fn):
        def run(*leaves):
            with torch.autocast("cpu", BF, enabled=leaves[0].dtype != torch.float64):
                return fn(*leaves)

        return run

    check_against_definition(*map(cast, pair(True, mask)), tensors, grads)


@pytest.mark.parametrize("masked", [True, False])
def test_without_statistics_the_backward_pass_takes_them_itself(monkeypatch, masked):
    """As on every GPU but Hopper's."""
    monkeypatch.setattr(launches, "folds_output", lambda z, hidden, dtype: False)
    tensors, grads, mask = problem(17, 24, 32, BF, FULL, masked)
    check_against_definition(*pair(True, mask), tensors, grads)


@pytest.mark.parametrize("parameter_dtype", [FULL, BF])
def test_joint_matrices_are_halves_of_one(parameter_dtype):
    """The same results, and gradients of the whole matrices."""
    tensors, grads, mask = problem(9, 32, 16, BF, parameter_dtype, True)
    z, gamma, beta, a_p, a_g, b_p, b_g, *ends = tensors
    joint = [z, gamma, beta, torch.cat((a_p, b_p)), torch.cat((a_g, b_g)), *ends]

    def of_joint(fn):
        return lambda z, *w: [fn(z, JointWeights(*w), True, mask)]

    found = gradients(of_joint(triangle_multiplication), joint, grads, None)
    y, dz, dg, db, d_ap, d_ag, d_bp, d_bg, *rest = gradients(pair(True, mask)[0], tensors, grads, None)
    expected = [y, dz, dg, db, torch.cat((d_ap, d_bp)), torch.cat((d_ag, d_bg)), *rest]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    check_against_definition(
        of_joint(triangle_multiplication), of_joint(triangle_multiplication_reference), joint, grads
    )


def into_pair(mask, keep, itself):
    """With a residual: z itself, or the second of the tensors."""

    def run(fn):
        def call(z, *rest):
            residual, *weights = (z, *rest) if itself else rest
            return [fn(z, TriangleWeights(*weights), True, mask, residual=residual, keep=keep)]

        return call

    return run(triangle_multiplication), run(triangle_multiplication_reference)


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tokens", "folds"), [(FULL, 9, False), (BF, 16, True), (BF, 17, True), (HALF, 11, False)]
)
def test_dropout_and_residual(dtype, tokens, folds, itself, monkeypatch):
    """z as its own residual has one gradient, of both ways, rounded once."""
    if not folds:
        monkeypatch.setattr(launches, "folds_output", lambda z, hidden, dtype: False)
    tensors, grads, mask = problem(tokens, 32, 16, dtype, FULL, True)
    keep = (torch.rand(tokens, 1, 32) > 0.25) / 0.75
    other, weights = torch.randn(tokens, tokens, 32).to(dtype), TriangleWeights(*tensors[1:])
    assert supported(tensors[0], weights, mask, other, keep).ok
    assert not supported(tensors[0], weights, mask, other[1:], keep).ok
    if not itself:
        tensors.insert(1, other)
    check_against_definition(*into_pair(mask, keep, itself), tensors, grads)


@pytest.mark.parametrize("tokens", [16, 13])
def test_the_residual_stays_in_float32_under_autocast(tokens):
    tensors, grads, mask = problem(tokens, 32, 16, FULL, FULL, True)

    def run(into):
        def call(z, *weights):
            residual = {"residual": z} if into else {}
            return [triangle_multiplication(z, TriangleWeights(*weights), False, mask, **residual)]

        return call

    with torch.autocast("cpu", BF):
        whole, update = (
            gradients(run(True), tensors, grads, None),
            gradients(run(False), tensors, grads, None),
        )
    assert whole[0].dtype == FULL and update[0].dtype == BF
    assert torch.equal(whole[0], tensors[0] + update[0])
    torch.testing.assert_close(whole[1], update[1] + grads[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], update[2:], strict=True))


def test_kept_statistics_are_those_of_the_rows():
    tensors, _, mask = problem(13, 24, 16, BF, FULL, True)
    tensors[0] += 40  # taken from differences to the first channel, they lose nothing to a large mean
    _, x, stats = launches.forward(tensors[0], TriangleWeights(*tensors[1:]), mask, True, 1e-5, BF)
    for kept, rows in ((stats[:2], x.permute(1, 2, 0)), (stats[2:4], tensors[0])):
        rows = rows[:13, :13].double()
        rstd = (rows.var(-1, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(kept[0, :13, :13].double(), rstd, rtol=1e-5, atol=0)
        torch.testing.assert_close(kept[1, :13, :13].double(), -rows.mean(-1) * rstd, rtol=1e-5, atol=1e-5)
        assert not kept[:, 13:].any() and not kept[:, :, 13:].any()
    assert torch.equal(stats[4, :13, :13], torch.where(mask, stats[2, :13, :13], 0.0))
    assert not stats[4, 13:].any() and not stats[4, :, 13:].any()


def weights64(weights):
    return TriangleWeights(*(w.double() for w in weights))


def test_gradients_repeat_bit_for_bit():
    tensors, grads, mask = problem(19, 16, 16, BF, FULL, True)
    check_bitwise(pair(True, mask)[0], tensors, grads, times=3)


def test_transposed_input_equals_the_other_reading():
    """Strides over i and j are free: a transposed view gives what its copy gives."""
    tensors, _, mask = problem(10, 16, 16, FULL, FULL, True)
    weights = TriangleWeights(*tensors[1:])
    view = tensors[0].transpose(0, 1)
    assert torch.equal(
        triangle_multiplication(view, weights, True, mask),
        triangle_multiplication(view.contiguous(), weights, True, mask),
    )


def test_masked_pairs_do_not_matter():
    tensors, _, mask = problem(12, 16, 16, FULL, FULL, True)
    weights = TriangleWeights(*tensors[1:])
    changed = torch.where(mask[..., None], tensors[0], torch.randn_like(tensors[0]))
    first = triangle_multiplication(tensors[0], weights, True, mask)
    second = triangle_multiplication(changed, weights, True, mask)
    assert torch.equal(first[mask], second[mask])
    assert not torch.equal(first, second)


def test_fake_tensors_and_registration():
    tensors, _, mask = problem(7, 16, 16, BF, FULL, True)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        y, _, stats = torch.ops.megafold_bench.triangle_multiplication(
            *fakes, mode.from_tensor(mask), None, None, True, 1e-5, BF
        )
        wide = fakes[0].float()
        into = torch.ops.megafold_bench.triangle_multiplication(
            *fakes, mode.from_tensor(mask), wide, None, True, 1e-5, BF
        )[0]
    assert into.shape == (7, 7, 16) and into.dtype == FULL
    assert y.shape == (7, 7, 16) and y.dtype == BF and stats.shape == (5, 16, 16)
    leaves = [t.clone().requires_grad_() for t in tensors]
    keep = torch.ones(1, 7, 16, dtype=BF)
    for into in ((None, None), (torch.randn(7, 7, 16, dtype=BF), keep), (leaves[0], None)):
        torch.library.opcheck(
            torch.ops.megafold_bench.triangle_multiplication.default,
            (*leaves, mask, *into, False, 1e-5, BF),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_definition_runs_where_the_kernels_do_not():
    tensors, _, mask = problem(6, 16, 16, FULL, FULL, True)
    weights = TriangleWeights(*tensors[1:])
    verdict = supported(tensors[0], weights, mask.float())
    assert not verdict.ok and "boolean" in verdict.reason
    assert torch.equal(
        triangle_multiplication(tensors[0], weights, True, mask.float()),
        triangle_multiplication_reference(tensors[0], weights, True, mask.float()),
    )
    assert "[N, N, c]" in supported(tensors[0][:3], weights).reason
