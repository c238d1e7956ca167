"""Attention with a shared pair bias: kernels under Triton's interpreter against fp64, and the operator's contract."""

import math
from dataclasses import replace

import pytest
import torch

from optimized.ops.attention import (
    attention,
    attention_backward,
    attention_with_lse,
    launch,
    reference,
    supported,
)
from optimized.ops.attention.operator import run_backward
from optimized.ops.tuning import Config, forget
from tests.optimized.ops.attention_checks import (
    DTYPES,
    NAMES,
    Case,
    check,
    make,
    relative,
    with_grads,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 64])
def test_error_no_larger_than_eager_for_every_head_size(dtype, dim):
    check(make(dtype, rows=2, heads=1, queries=17, keys=35, dim=dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 4), (1, 40), (33, 5), (32, 32)])
def test_lengths(dtype, queries, keys):
    """With very few keys the gradients of scores cancel, and delta taken from the rounded output shows (16 bits)."""
    factor = 4.0 if keys < 8 and dtype != torch.float32 else 1.1
    check(make(dtype, rows=2, heads=2, queries=queries, keys=keys, masked=False), dtype, factor)


@pytest.mark.parametrize("layout", ["head", "fused", "column"])
def test_strided_inputs_are_read_in_place(layout):
    case = make(torch.bfloat16, rows=2, layout=layout)
    q = case.leaves[0][None] if case.leaves[0].dim() == 4 else case.leaves[0]
    assert launch.aligned(q) is q
    check(case, torch.bfloat16)


@pytest.mark.parametrize("keys", [24, 37])
def test_transposed_bias(keys):
    case = make(torch.bfloat16, rows=2, heads=1, queries=24, keys=keys)
    flipped = case.leaves[3].transpose(-1, -2).contiguous().transpose(-1, -2)
    straight = with_grads(attention, case, torch.bfloat16)
    case.leaves[3] = flipped
    for a, b in zip(with_grads(attention, case, torch.bfloat16), straight, strict=True):
        assert torch.equal(a, b)


def test_batch_axes():
    case = make(torch.bfloat16, batch=(2, 2), rows=2, heads=1, queries=9, keys=18)
    whole = with_grads(attention, case, torch.bfloat16)
    one = Case([x[1, 0] for x in case.leaves], case.do[1, 0], case.mask[1, 0])
    for a, b in zip(whole, with_grads(attention, one, torch.bfloat16), strict=True):
        assert torch.equal(a[1, 0], b)


def test_bias_of_another_dtype():
    case = make(torch.bfloat16)
    case.leaves[3] = case.leaves[3].float() + 1e-3
    leaves = [x.detach().requires_grad_() for x in case.leaves]
    grads = torch.autograd.grad(attention(*leaves, case.mask), leaves, case.do)
    assert grads[3].dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in case.leaves]
    o = reference.attention(*exact, case.mask)
    assert relative(grads[3], torch.autograd.grad(o, exact, case.do.double())[3]) < 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_fully_masked_rows_give_zero(dtype):
    case = make(dtype)
    case.leaves[3] = case.leaves[3] + 3
    o, lse = attention_with_lse(*case.leaves, case.mask)
    assert torch.equal(o[:, 0], torch.zeros_like(o[:, 0]))
    assert bool((lse[:, 0] == -math.inf).all()) and bool(lse[:, 1:].isfinite().all())
    grads = with_grads(attention, case, dtype)
    for name, g in zip(NAMES[:4], grads[:4], strict=True):
        assert torch.equal(g[:, 0], torch.zeros_like(g[:, 0])), name
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [300.0, -300.0, 70.0])
def test_large_logits_take_the_running_maximum(dtype, shift):
    """exp of these logits over- or underflows without a maximum: the second attempt must be exact."""
    case = make(dtype)
    case.leaves[3] = case.leaves[3] + torch.linspace(0, shift, 19)[:, None].to(dtype)
    check(case, dtype, 1.3)


def test_garbage_in_masked_keys_is_ignored():
    case = make(torch.bfloat16)
    clean = with_grads(attention, case, torch.bfloat16)
    hidden = ~case.mask[:, :, None, :, None].expand_as(case.leaves[1])
    for i in (1, 2):
        case.leaves[i] = case.leaves[i].masked_fill(hidden, 1e4)
    for name, a, b in zip(NAMES, with_grads(attention, case, torch.bfloat16), clean, strict=True):
        assert torch.equal(a, b), name


def test_repeats_are_bitwise_equal():
    case = make(torch.bfloat16, rows=3, heads=1)
    first = with_grads(attention, case, torch.bfloat16)
    for a, b in zip(first, with_grads(attention, case, torch.bfloat16), strict=True):
        assert torch.equal(a, b)


def test_several_rows_a_program(monkeypatch):
    """The last group of rows is not full."""
    case = make(torch.float32, rows=4, heads=1, queries=20, keys=40)
    row = Config({"ROWS": 3, "BQ": 16, "BK": 16, "STAGES": 1})
    plan = launch.Plan(row, row, Config({"BQ": 32, "BK": 16, "STAGES": 1}), row)
    monkeypatch.setattr(launch, "plan_for", lambda q, precision: plan)
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [52, 9])
def test_scores_a_step_early(dtype, keys, monkeypatch):
    """Of one row or of two, the results are the same in every bit, past the last tile and for one tile."""
    case = make(dtype, rows=5, heads=1, queries=keys - 12 if keys > 12 else 7, keys=keys, dim=24)

    def results(ahead):
        rows = Config({"ROWS": 3, "BQ": 16, "BK": 16, "STAGES": 1})
        forward = Config({**rows.constants, "AHEAD": ahead})
        monkeypatch.setattr(launch, "plan_for", lambda q, precision: launch.Plan(forward, rows, None, rows))
        forget()
        return with_grads(attention, case, dtype)

    plain = results(0)
    for ahead in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(results(ahead), plain, strict=True))


@pytest.fixture
def planes(monkeypatch):
    """Make the kernel of dq write planes of dbias, for groups of some rows, some groups at a time."""

    def choose(rows, queries, keys, groups=None):
        row = Config({"ROWS": rows, "BQ": queries, "BK": keys, "STAGES": 1})
        other = Config({"ROWS": 1, "BQ": 32, "BK": 32, "STAGES": 1})
        monkeypatch.setattr(launch, "plan_for", lambda q, precision: launch.Plan(other, other, None, row))
        if groups is not None:
            monkeypatch.setattr(launch, "plane_groups", lambda call, config, dbias, spent: groups)

    return choose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_planes_of_the_bias_gradient(dtype, groups, planes):
    """Three groups of rows, the last with one of three, in three, two and one chunks; several batches and tiles."""
    planes(3, 16, 32, groups)
    check(make(dtype, rows=7, heads=2, queries=19, keys=45, batch=(2,), dim=8), dtype)


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (32, 64), (128, 32), (16, 128)])
def test_planes_of_every_width(queries, keys, planes):
    """Blocks of 16 columns by one, two, four and eight; lengths beyond one padded tile."""
    planes(2, queries, keys)
    check(make(torch.bfloat16, rows=3, heads=1, queries=130, keys=140, dim=8), torch.bfloat16)


def test_a_row_past_the_last_adds_nothing_to_the_planes(planes):
    """One row in a group of four: what its three stand-ins would add is three times dbias."""
    planes(4, 16, 16)
    check(make(torch.float32, rows=1, masked=False), torch.float32)


def test_planes_take_the_place_of_dk_and_dv(monkeypatch):
    """At most as many values as these two have beside the sum, in chunks of about equal size that fill the device."""
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    config = Config({"ROWS": 2, "BQ": 64, "BK": 32, "STAGES": 1})

    def groups(rows, heads, length, dim, dtype=torch.bfloat16, spent=False):
        x = torch.empty((1, rows, heads, length, dim), device="meta")
        call = launch.Call(x, x, x, x, x, x, x, x, 1.0, "ieee")
        dbias = torch.empty((1, 1, heads, length, length), device="meta", dtype=dtype)
        call = replace(call, source=dbias)
        return launch.plane_groups(call, config, dbias, spent)

    assert groups(768, 4, 768, 32) == 64
    assert groups(768, 4, 768, 32, spent=True) == 32
    assert groups(384, 4, 384, 32) == 64
    assert groups(384, 4, 384, 32, spent=True) == 64  # of 192; 32 are as large as k, which is not much
    assert groups(48, 16, 768, 48) == 4  # of 24; 4 fit beside the sum
    assert groups(48, 16, 768, 48, dtype=torch.float32) == 6  # the sum is the result
    assert groups(90, 4, 768, 32) == 9  # of 45; 5 fit beside the sum, but 11 fill the device: five chunks
    assert groups(1, 16, 384, 24) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_bias_packed_at_once_or_when_it_is_needed(masked, monkeypatch, planes):
    """A large bias is packed for dk and dv late, when its other form is gone: the same gradients."""
    planes(2, 16, 32, 1)
    case = make(torch.bfloat16, rows=3, queries=19, keys=45, masked=masked)
    made = []
    pack = launch._prepare
    monkeypatch.setattr(
        launch, "_prepare", lambda call, mask, **ways: (made.append(ways), pack(call, mask, **ways))
    )
    late = with_grads(attention, case, torch.bfloat16)
    assert len(made) == 3  # forward, backward, late
    monkeypatch.setattr(launch, "LARGE_BIAS", 1e9)
    for a, b in zip(with_grads(attention, case, torch.bfloat16), late, strict=True):
        assert torch.equal(a, b)
    assert len(made) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_place_of_keys_and_values(dtype, planes):
    """The last group of rows is not full: its stand-ins read what the program writes."""
    planes(3, 16, 32, 1)
    case = make(dtype, rows=4, heads=2, queries=19, keys=45, batch=(2,))
    o, lse = attention_with_lse(*case.leaves, case.mask)
    inputs = (case.mask, o, lse, None, case.do.shape[-1] ** -0.5, "ieee", True)
    apart = run_backward(case.do, None, *case.leaves, *inputs)
    q, k, v, bias = (x.clone() for x in case.leaves)
    found = run_backward(case.do, None, q, k, v, bias, *inputs, True)
    for name, a, b in zip(NAMES[1:], found, apart, strict=True):
        assert torch.equal(a, b), name
    dq, dk, dv, _ = found
    assert dk.data_ptr() == k.data_ptr() and dv.data_ptr() == v.data_ptr() and dq.data_ptr() != q.data_ptr()


def test_no_bias_gradient_where_none_is_asked_for(planes, monkeypatch):
    planes(2, 16, 32)
    case = make(torch.bfloat16)
    whole = with_grads(attention, case, torch.bfloat16)
    monkeypatch.setattr(launch, "fold_planes_kernel", None)  # calling it would fail
    leaves = [x.detach().requires_grad_() for x in case.leaves[:3]]
    grads = torch.autograd.grad(attention(*leaves, case.leaves[3], case.mask), leaves, case.do)
    for a, b in zip(grads, whole[1:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_tiles_of_the_diffusion_attention_in_fp32(precision, monkeypatch):
    """Those of an H200, with the 48 channels a head that token attention has."""
    case = make(torch.float32, rows=2, heads=1, queries=70, keys=45, dim=48)
    plan = launch.default_plan(torch.float32, 48, "sm_90", precision)
    monkeypatch.setattr(launch, "plan_for", lambda q, precision: plan)
    check(case, torch.float32)


def test_pieces_of_the_keys_merge_through_lse():
    """What pair sharding does: two halves of the keys, outputs and gradients merged from log-sum-exps."""
    case = make(torch.float32, keys=48)
    q, k, v, bias = case.leaves
    o, lse = attention_with_lse(q, k, v, bias, case.mask)
    halves = [slice(0, 24), slice(24, 48)]
    parts = [
        attention_with_lse(q, k[..., s, :], v[..., s, :], bias[..., s], case.mask[..., s]) for s in halves
    ]
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [torch.exp(p[1] - merged.nan_to_num(neginf=0.0)) for p in parts]
    torch.testing.assert_close(sum(w[..., None] * p[0] for w, p in zip(weights, parts, strict=True)), o)
    whole = attention_backward(case.do, q, k, v, bias, case.mask, o, lse)
    pieces = [
        attention_backward(case.do, q, k[..., s, :], v[..., s, :], bias[..., s], case.mask[..., s], o, lse)
        for s in halves
    ]
    torch.testing.assert_close(pieces[0][0] + pieces[1][0], whole[0])
    for i, axis in ((1, -2), (2, -2), (3, -1)):
        torch.testing.assert_close(torch.cat([p[i] for p in pieces], axis), whole[i])


def test_gradient_through_lse():
    case = make(torch.float32, masked=False)
    for f, dtype in ((attention_with_lse, torch.float32), (reference.attention_with_lse, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in case.leaves]
        o, lse = f(*leaves, case.mask)
        grads = torch.autograd.grad((o * case.do).sum() + lse.sin().sum(), leaves)
        if dtype == torch.float32:
            ours = grads
    for a, b in zip(ours, grads, strict=True):
        assert relative(a, b) < 1e-6


def test_definition_where_kernels_do_not_apply():
    case = make(torch.float64, rows=2, heads=1, queries=3, keys=4, dim=8)
    assert not supported(*case.leaves).ok and "float64" in supported(*case.leaves).reason
    odd = make(torch.float32, dim=40)
    assert "head size 40" in supported(*odd.leaves).reason
    exact = with_grads(reference.attention, odd, torch.float64)
    for a, x in zip(with_grads(attention, odd, torch.float32), exact, strict=True):
        assert relative(a, x) < 1e-6
    leaves = [x.requires_grad_() for x in case.leaves]
    assert torch.autograd.gradcheck(lambda *a: attention(*a, case.mask), leaves)


def test_written_backward_is_the_derivative_of_the_definition():
    case = make(torch.float64)
    o, lse = reference.attention_with_lse(*case.leaves, case.mask)
    grads = reference.attention_backward(case.do, *case.leaves, case.mask, o, lse)
    for a, b in zip(grads, with_grads(reference.attention, case, torch.float64)[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["token", "fused"])
def test_operator_registration(layout):
    case = make(torch.float32, rows=2, heads=1, queries=5, keys=9, dim=8, layout=layout)
    args = (*[x.detach().requires_grad_() for x in case.leaves], case.mask, 0.25, "ieee")
    torch.library.opcheck(torch.ops.megafold_bench.pair_attention.default, args)


def test_compiles_without_graph_breaks():
    case = make(torch.float32, rows=2, heads=1, queries=5, keys=9, dim=8)
    compiled = torch.compile(lambda *a: attention(*a).sin(), fullgraph=True, backend="aot_eager")
    expected = with_grads(lambda *a: attention(*a).sin(), case, torch.float32)
    for a, b in zip(with_grads(compiled, case, torch.float32), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_without_computing():
    with torch.device("meta"):
        q, bias = torch.empty(1, 4096, 4, 4096, 32), torch.empty(1, 1, 4, 4096, 4096)
    o, lse = attention_with_lse(q, q, q, bias)
    assert o.shape == q.shape and lse.shape == q.shape[:-1] and o.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c[0], c[1], c[1][..., :8], c[3], None), "v"),
        (lambda c: (c[0], c[1], c[2], c[3][..., :-1], None), "bias must be"),
        (lambda c: (c[0], c[1], c[2], c[3], torch.ones(1, 3, 37)), "mask must be boolean"),
        (lambda c: (c[0], c[1][:, :2], c[2][:, :2], c[3], None), "disagree"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(make(torch.float32).leaves))


def test_gradients_do_not_suffer_from_the_rounding_of_the_log_sum_exp():
    """Where it is near 9 its rounding alone would put them at 1.4 to 1.8 times the definition's errors in float32."""
    own, eager = [0.0] * 5, [0.0] * 5
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v, do = (torch.randn(1, 2, 2, 64, 16) for _ in range(4))
        leaves, do = [q, k, v, torch.randn(1, 1, 2, 64, 64) * 2 + 3.5], [do]
        exact = value_and_gradients(plain, leaves, do, torch.float64)
        for errors, function in ((own, attention), (eager, plain)):
            found = value_and_gradients(function, leaves, do, torch.float32)
            for index, (a, e) in enumerate(zip(found, exact, strict=True)):
                errors[index] += ((a.double() - e).norm() / e.norm()).item()
    assert all(a <= 1.25 * e for a, e in zip(own, eager, strict=True)), (own, eager)


def plain(q, k, v, bias):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v


def value_and_gradients(function, leaves, grads, dtype):
    tensors = [t.to(dtype).requires_grad_() for t in leaves]
    value = function(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors, grads[0].to(dtype))]
