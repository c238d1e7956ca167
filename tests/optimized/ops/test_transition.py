import pytest
import torch
from fused_checks import check_against_definition, check_bitwise, distance, parameters
from torch._subclasses.fake_tensor import FakeTensorMode

from optimized.ops import launching
from optimized.ops.launching import tile
from optimized.ops.support import interpreting
from optimized.ops.transition import full, launch, supported, transition, transition_reference

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


def problem(shape, channels, factor, dtype, parameter_dtype):
    torch.manual_seed(len(shape) + channels)
    hidden = factor * channels
    weights = parameters(
        [(channels,), (channels,), (hidden, channels), (hidden, channels), (channels, hidden)],
        parameter_dtype,
    )
    x = (torch.randn(*shape, channels) * 2 + 0.3).to(dtype)
    return [x, *weights], [torch.randn(*shape, channels).to(dtype)]


def ours(*tensors):
    return [transition(*tensors)]


def definition(*tensors):
    return [transition_reference(*tensors)]


@pytest.mark.parametrize(
    ("shape", "channels", "factor", "dtype", "parameter_dtype"),
    [
        ((7, 11), 16, 4, FULL, FULL),
        ((37,), 24, 2, FULL, FULL),
        ((7, 11), 32, 4, BF, FULL),
        ((3, 43), 64, 2, BF, BF),
        ((1, 1), 128, 4, BF, FULL),
        ((13,), 96, 2, HALF, FULL),
        ((2, 3, 5), 48, 4, HALF, HALF),
        ((19,), 384, 4, BF, FULL),
    ],
)
def test_errors_against_fp64(shape, channels, factor, dtype, parameter_dtype):
    tensors, grads = problem(shape, channels, factor, dtype, parameter_dtype)
    assert supported(*tensors).ok
    check_against_definition(ours, definition, tensors, grads)


def with_input(fn):
    return lambda *tensors: [fn(*tensors, added=True)]


@pytest.mark.parametrize(
    ("shape", "channels", "dtype"), [((7, 11), 64, BF), ((37,), 24, FULL), ((13,), 96, HALF)]
)
def test_input_and_update_in_one(shape, channels, dtype):
    """x + y, and its gradient by way of both, each rounded once."""
    tensors, grads = problem(shape, channels, 2, dtype, FULL)
    check_against_definition(with_input(transition), with_input(transition_reference), tensors, grads)
    check_bitwise(with_input(transition), tensors, grads, times=2)


def test_a_float32_input_and_its_update_of_16_bits():
    """Under autocast: the residual stays in float32, both ways."""
    tensors, _ = problem((9, 7), 64, 2, FULL, FULL)
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn(9, 7, 64)
    with torch.autocast("cpu", dtype=BF):
        whole, update = transition(*leaves, added=True), transition(*leaves)
    assert whole.dtype == FULL and update.dtype == BF
    assert distance(whole - leaves[0], update.float()) < 2**-8
    d_whole = torch.autograd.grad(whole, leaves, grad)
    d_update = torch.autograd.grad(update, leaves, grad.to(BF))
    torch.testing.assert_close(d_whole[0], d_update[0] + grad)
    assert all(torch.equal(a, b) for a, b in zip(d_whole[1:], d_update[1:], strict=True))


PLAIN = {
    "forward": tile(16, 32, 4, 2),
    "input_gradient": tile(16, 32, 4, 2),
    "weight_gradient": tile(32, 16, 4, 2),
}
OTHER = {
    "forward": launch.form("JOINT", 16, 32, 4, 2),
    "input_gradient": launch.form("JOINT", 16, 32, 4, 2),
    "weight_gradient": launch.form("TURNED", 16, 32, 4, 2),
}


@pytest.fixture(params=[PLAIN, OTHER], ids=["plain", "other"])
def forms(request, monkeypatch):
    """Both forms of the kernels with tiles that make programs take several, and several programs share the sums."""
    monkeypatch.setattr(launch, "default", lambda kernel, *_: request.param[kernel.partition(".")[2]])
    monkeypatch.setattr(launching, "processors", lambda device: 1)
    launching.chosen.cache_clear()
    yield
    launching.chosen.cache_clear()


@pytest.mark.parametrize(("channels", "factor", "dtype"), [(64, 2, BF), (64, 1, HALF), (48, 1, BF)])
def test_forms_of_the_kernels(forms, channels, factor, dtype):
    """Whole chunks of the hidden layer and parts of one, padded channels, and a last tile with rows missing."""
    tensors, grads = problem((7, 11), channels, factor, dtype, FULL)
    check_against_definition(ours, definition, tensors, grads)
    check_bitwise(ours, tensors, grads, times=2)


def test_gradients_repeat_bit_for_bit():
    check_bitwise(ours, *problem((9, 31), 32, 4, BF, FULL), times=4)


def test_strided_input_and_gradient():
    tensors, grads = problem((6, 10), 32, 2, BF, FULL)
    tensors[0] = tensors[0].transpose(0, 1)
    grads[0] = grads[0].transpose(0, 1)
    check_against_definition(ours, definition, tensors, grads)


def test_autocast_runs_the_products_in_its_dtype():
    tensors, _ = problem((5, 7), 32, 4, FULL, FULL)
    with torch.autocast("cpu", dtype=BF):
        y = transition(*tensors)
    assert y.dtype == BF
    low = transition_reference(*tensors, dtype=BF)
    torch.testing.assert_close(y, low, rtol=0.05, atol=0.05)


def test_a_large_mean_is_taken_out_before_rounding():
    tensors, _ = problem((5, 7), 32, 4, FULL, FULL)
    tensors[0] = tensors[0] + 200
    exact = transition_reference(*(t.double() for t in tensors))
    with torch.autocast("cpu", dtype=BF):
        y = transition(*tensors)
        eager = transition_reference(*tensors, dtype=BF)
    assert distance(eager, exact) < 0.02
    assert distance(y, exact) <= 1.1 * distance(eager, exact)


def test_fake_tensors_and_registration():
    tensors, _ = problem((4, 5), 16, 4, BF, FULL)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        y = torch.ops.megafold_bench.transition(*fakes, 1e-5, BF, False)
        assert torch.ops.megafold_bench.transition(fakes[0].float(), *fakes[1:], 1e-5, BF, True).dtype == FULL
    assert y.shape == (4, 5, 16) and y.dtype == BF
    leaves = [t.clone().requires_grad_() for t in tensors]
    for added in (False, True):
        arguments = (*leaves, 1e-5, BF, added)
        torch.library.opcheck(torch.ops.megafold_bench.transition.default, arguments, test_utils=CHECKS)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_definition_runs_where_the_kernels_do_not():
    tensors, _ = problem((5,), 1024, 2, BF, FULL)
    verdict = supported(*tensors)
    assert not verdict.ok and "1024 channels" in verdict.reason
    torch.testing.assert_close(transition(*tensors), transition_reference(*tensors))


@pytest.mark.parametrize("channels", [24, 192, 1024])
def test_fp32_runs_over_runs_of_rows(channels, monkeypatch):
    """Also a last run that is shorter; each result is the definition's but for the order of sums over rows."""
    monkeypatch.setattr(full, "RUN", 2 * 2 * channels * 4)
    tensors, grads = problem((3, 5), channels, 2, FULL, FULL)
    assert [r.stop - r.start for r in full._runs(15, 2 * channels)] == [4] * 4
    check_against_definition(ours, definition, tensors, grads)
    check_bitwise(ours, tensors, grads, times=3)


def test_fp32_keeps_nothing_of_the_hidden_layer():
    tensors, _ = problem((3, 5), 32, 4, FULL, FULL)
    leaves = [t.clone().requires_grad_() for t in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        transition(*leaves)
    assert sorted(kept) == sorted(t.shape for t in leaves)


def test_fp32_parameters_of_another_dtype():
    tensors, grads = problem((3, 5), 32, 2, FULL, BF)
    check_against_definition(ours, definition, tensors, grads)


def test_an_autocast_around_backward_changes_nothing_in_fp32():
    tensors, grads = problem((3, 5), 32, 2, FULL, FULL)
    leaves = [t.clone().requires_grad_() for t in tensors]
    plain = torch.autograd.grad(transition(*leaves), leaves, grads)
    y = transition(*leaves)
    with torch.autocast("cpu", dtype=BF):
        around = torch.autograd.grad(y, leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))


def test_the_interpreter_is_on():
    assert interpreting()
