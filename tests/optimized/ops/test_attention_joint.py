"""The joint backward kernel under Triton's interpreter: against fp64, as the eager definition is, and against itself."""

import pytest
import torch

from optimized.ops.attention import (
    attention,
    attention_backward,
    attention_with_lse,
    joint_launch,
    launch,
    reference,
)
from optimized.ops.tuning import Config
from tests.optimized.ops.attention_checks import (
    NAMES,
    Case,
    check,
    check_in_place,
    make,
    relative,
    with_grads,
)

BF16 = torch.bfloat16
OTHER = Config({"ROWS": 1, "BQ": 32, "BK": 32, "STAGES": 1})


@pytest.fixture
def joint(monkeypatch):
    """Take gradients jointly, in chunks of `groups` groups of rows, `share` key tiles a program; no other kernel may."""

    def choose(rows, queries, keys, groups=None, share=None, bias_alone=False):
        config = Config({"ROWS": rows, "BQ": queries, "BK": keys, "STAGES": 1})
        bias = Config({"BQ": 32, "BK": 32, "STAGES": 1}) if bias_alone else None
        plan = launch.Plan(OTHER, OTHER, bias, OTHER, config)
        monkeypatch.setattr(launch, "plan_for", lambda q, precision: plan)
        monkeypatch.setattr(launch, "grad_kv_kernel", None)  # calling it would fail
        monkeypatch.setattr(launch, "grad_q_kernel", None)
        if groups is not None:
            monkeypatch.setattr(joint_launch, "shares", lambda *_: (groups, share))

    return choose


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 64])
def test_error_no_larger_than_eager_for_every_head_size(dim, joint):
    joint(2, 16, 16)
    check(make(BF16, rows=3, heads=2, queries=19, keys=45, dim=dim), BF16)


@pytest.mark.parametrize(("rows", "queries", "keys"), [(1, 64, 64), (2, 64, 128), (3, 16, 32), (1, 32, 16)])
def test_tiles(rows, queries, keys, joint):
    """The last group of rows is not full; lengths beyond one padded tile."""
    joint(rows, queries, keys)
    check(make(BF16, rows=4, heads=1, queries=130, keys=140, dim=8), BF16)


@pytest.mark.parametrize(("groups", "share"), [(4, 3), (3, 2), (1, 1), (2, 3)])
def test_chunks_of_rows_and_splits_of_keys(groups, share, joint):
    """Seven rows in four groups, three key tiles, two batches: the same values in whatever pieces dk, dv and dbias come."""
    case = make(BF16, rows=7, heads=2, queries=19, keys=45, batch=(2,), dim=8)
    joint(2, 16, 16, 4, 3)
    whole = with_grads(attention, case, BF16)
    joint(2, 16, 16, groups, share)
    check(case, BF16)
    for name, a, b in zip(NAMES, with_grads(attention, case, BF16), whole, strict=True):
        assert torch.equal(a, b) or (name == "dq" and relative(a, b.double()) < 2e-3), name


@pytest.mark.parametrize("bias_alone", [False, True])
def test_gradients_in_place_of_queries_keys_and_values(bias_alone, joint):
    """In chunks, with keys split over programs; the last group of rows is not full."""
    joint(2, 16, 16, 1, 2, bias_alone)
    check_in_place(make(BF16, rows=3, heads=2, queries=19, keys=45, batch=(2,)), 3)


def test_bias_gradient_by_its_own_kernel(joint):
    joint(1, 16, 32, bias_alone=True)
    check(make(BF16, rows=3, queries=40, keys=50), BF16)


def test_lengths_without_a_mask(joint):
    joint(2, 16, 16)
    check(make(BF16, rows=3, heads=1, queries=33, keys=21, masked=False), BF16)


@pytest.mark.parametrize("layout", ["head", "fused", "column"])
def test_strided_inputs(layout, joint):
    joint(2, 16, 16)
    check(make(BF16, rows=3, layout=layout), BF16)


def test_bias_of_another_dtype_and_orientation(joint):
    joint(2, 16, 16)
    case = make(BF16, keys=24)
    case.leaves[3] = case.leaves[3].float().transpose(-1, -2).contiguous().transpose(-1, -2) + 1e-3
    leaves = [x.detach().requires_grad_() for x in case.leaves]
    grads = torch.autograd.grad(attention(*leaves, case.mask), leaves, case.do)
    assert grads[3].dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in case.leaves]
    o = reference.attention(*exact, case.mask)
    for ours, right in zip(grads, torch.autograd.grad(o, exact, case.do.double()), strict=True):
        assert relative(ours, right) < 6e-3


def test_fully_masked_rows_give_zero_and_garbage_in_masked_keys_is_ignored(joint):
    joint(2, 16, 16)
    case = make(BF16)
    clean = with_grads(attention, case, BF16)
    for name, g in zip(NAMES[:4], clean[:4], strict=True):
        assert torch.equal(g[:, 0], torch.zeros_like(g[:, 0])), name
    hidden = ~case.mask[:, :, None, :, None].expand_as(case.leaves[1])
    for i in (1, 2):
        case.leaves[i] = case.leaves[i].masked_fill(hidden, 1e30)
    o, lse = attention_with_lse(*(x.nan_to_num() for x in case.leaves), case.mask)
    grads = attention_backward(case.do, *case.leaves, case.mask, o, lse)
    for name, a, b in zip(NAMES, (o, *grads), clean, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shift", [300.0, -300.0, -1e4])
def test_large_logits(shift, joint):
    joint(1, 16, 16)
    case = make(BF16)
    case.leaves[3] = case.leaves[3] + torch.linspace(0, shift, 19)[:, None].to(BF16)
    check(case, BF16, 1.3)


def test_gradient_of_log_sum_exp(joint):
    joint(2, 16, 16)
    case = make(BF16, masked=False)
    dlse = torch.randn(case.do.shape[:-1], generator=torch.Generator().manual_seed(3))

    def gradients(f, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in case.leaves]
        o, lse = f(*leaves, None)
        return torch.autograd.grad((o, lse), leaves, (case.do.to(dtype), dlse.to(lse.dtype)))

    exact = gradients(reference.attention_with_lse, torch.float64)
    eager = gradients(reference.attention_with_lse, BF16)
    for name, a, e, x in zip(NAMES[1:], gradients(attention_with_lse, BF16), eager, exact, strict=True):
        assert relative(a, x) <= 1.1 * relative(e, x), name


def test_no_bias_gradient_where_none_is_asked_for(joint, monkeypatch):
    joint(2, 16, 16)
    case = make(BF16)
    whole = with_grads(attention, case, BF16)
    monkeypatch.setattr(joint_launch, "fold_programs", None)  # calling it would fail
    leaves = [x.detach().requires_grad_() for x in case.leaves[:3]]
    grads = torch.autograd.grad(attention(*leaves, case.leaves[3], case.mask), leaves, case.do)
    for a, b in zip(grads, whole[1:4], strict=True):
        assert torch.equal(a, b)


def test_a_row_past_the_last_adds_nothing(joint):
    """One row in a group of four: what its three stand-ins would add is three times dbias."""
    joint(4, 16, 16)
    check(make(BF16, rows=1, masked=False), BF16)


def test_other_dtypes_and_a_scale_of_zero_go_to_the_other_kernels(monkeypatch):
    plan = launch.Plan(OTHER, OTHER, None, OTHER, OTHER)
    monkeypatch.setattr(launch, "plan_for", lambda q, precision: plan)
    monkeypatch.setattr(joint_launch, "joint_kernel", None)  # calling it would fail
    check(make(torch.float16), torch.float16)
    check(make(torch.float32), torch.float32)
    case: Case = make(BF16)
    leaves = [x.detach().requires_grad_() for x in case.leaves]
    dq = torch.autograd.grad(attention(*leaves, case.mask, scale=0.0), leaves, case.do)[0]
    assert torch.equal(dq, torch.zeros_like(dq))


def test_shares_fill_the_device_within_their_memory():
    """264 programs at a time, as two a multiprocessor of an H200 are; planes of two rows at 768 and 384 tokens."""
    mib = 1 << 20
    groups, share = joint_launch.shares(384, 4, 12, 264, 1229824, 196608, 108 * mib)
    splits = 12 // share
    assert groups * 4 * (1229824 + splits * 196608) <= 108 * mib
    assert 0.85 * 264 < groups * 4 * splits <= 264
    assert (
        joint_launch.shares(384, 4, 12, 264, 1229824, 196608, 1 << 40)[1] == 12
    )  # with memory, no key is split
    assert joint_launch.shares(1, 16, 6, 264, 0, 1 << 20, 1) == (
        1,
        1,
    )  # a single row: each key tile a program
