import ctypes
import gc

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

from optimized.kernels.implementations import MEGAFOLD
from optimized.kernels.problems import OPERATORS, make_problem
from optimized.ops import launcher, plans, tuning
from optimized.ops.launcher import launch
from optimized.ops.plans import Plan, planned

TOKENS = 5


@pytest.fixture
def following(monkeypatch):
    """Passes follow plans here though kernels are interpreted, whose launches plans repeat with tensors."""
    plans._plans.clear()
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    monkeypatch.setattr(plans, "current_stream", lambda device: 0)
    yield
    plans._plans.clear()


def made() -> list[Plan | str]:
    return [plan for plan in plans._plans.values() if plan != plans._MET]


def counted(run):
    """A pass of `run`, and the list of inputs it was really called with."""
    calls = []

    @planned
    def one(*inputs):
        calls.append(inputs)
        return run(*inputs)

    return one, calls


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("op", OPERATORS)
def test_a_plan_gives_the_bits_of_the_pass(op, dtype, monkeypatch):
    if op == "linear" and dtype != "fp32":
        pytest.skip("no kernel")
    plans._plans.clear()

    def results(seed):
        problem = make_problem(op, TOKENS, dtype, "cpu", seed, small=True)
        leaves = {name: t.requires_grad_() for name, t in problem.tensors.items()}
        outs = MEGAFOLD[op](problem)(leaves, problem.mask)
        return [*outs, *torch.autograd.grad(outs, list(leaves.values()), problem.grads, allow_unused=True)]

    plain = results(seed=2)
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    monkeypatch.setattr(plans, "current_stream", lambda device: 0)
    followed = [results(seed) for seed in range(3)][2]
    assert made() and all(isinstance(plan, Plan) for plan in made())
    for a, b in zip(plain, followed, strict=True):
        assert (a is None and b is None) or (torch.equal(a, b) and a.stride() == b.stride())
    plans._plans.clear()


def test_the_third_call_of_a_kind_follows_the_plan(following):
    one, calls = counted(lambda x, y, scale: (x.t() @ y).mul_(scale).view(-1)[1:])
    for n in range(5):
        x, y = torch.randn(3, 4), torch.randn(3, 5)
        torch.testing.assert_close(one(x, y, 2.0 + n // 3), (x.t() @ y).flatten()[1:] * (2.0 + n // 3))
    assert len(calls) == 4  # two for each scale, of which the second has no fifth call to follow


def test_a_product_kept_from_autocast_is_kept_from_it_in_the_plan(following):
    """As the transition's in float32 is; and casts of autocast are repeated."""

    def run(x):
        with torch.autocast("cpu", enabled=False):
            exact = x @ x.t()
        return exact, x @ x.t()

    one, calls = counted(run)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            x = torch.randn(6, 40)
            exact, cast = one(x)
            assert (exact.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
            torch.testing.assert_close(exact.double(), x.double() @ x.double().t(), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(8, 3).t(),
        torch.zeros(25)[1:].view(3, 8),
        torch.zeros(3, 8, dtype=torch.bfloat16),
        torch.zeros(3, 9)[:, :8],
        torch.zeros(4, 8),
    ],
    ids=["strides", "alignment", "dtype", "pitch", "shape"],
)
def test_another_kind_of_input_has_another_plan(following, other):
    one, calls = counted(lambda x: x.clone())
    for _ in range(3):
        one(torch.zeros(3, 8))
    assert len(calls) == 2
    one(other)
    assert len(calls) == 3


def test_a_tensor_given_twice_does_not_bind_the_next_call(following):
    one, calls = counted(lambda a, b: a - b)
    x, y = torch.randn(4), torch.randn(4)
    one(x, x)
    one(x, x)
    assert torch.equal(one(x, y), x - y) and len(calls) == 2


def test_an_input_inside_a_larger_tensor_is_read_where_it_lies(following):
    one, calls = counted(lambda x: x[1:] * 2)
    whole = torch.randn(64)
    for start in (0, 4, 8, 12):
        part = whole[start : start + 4]
        assert torch.equal(one(part), part[1:] * 2)
    assert len(calls) == 2


def test_what_depends_on_values_gets_no_plan(following):
    one, calls = counted(lambda x: x * 2 if x.sum().item() > 0 else x * 3)
    for value in (1.0, 1.0, -1.0, 1.0):
        x = torch.tensor([value])
        assert torch.equal(one(x), x * (2 if value > 0 else 3))
    assert len(calls) == 4 and "no tensor" in str(made()[0])


def test_what_reads_tensors_from_elsewhere_gets_no_plan(following):
    other = torch.ones(2)
    one, calls = counted(lambda x: x + other)
    for _ in range(4):
        one(torch.ones(2))
    assert len(calls) == 4 and "neither" in str(made()[0])


def test_plans_keep_no_tensor(following):
    one, calls = counted(lambda x, y: torch.mm(x, y).add_(1).sum(0))
    for _ in range(4):
        one(torch.randn(37, 41), torch.randn(41, 43))
    calls.clear()
    gc.collect()
    shapes = {(37, 41), (41, 43), (37, 43)}
    assert isinstance(made()[0], Plan)
    assert not [o for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) in shapes]


def test_plans_are_bounded(following, monkeypatch):
    monkeypatch.setattr(plans, "MOST", 4)
    one, _ = counted(lambda x: x + 1)
    for length in range(20):
        one(torch.zeros(length))
    assert len(plans._plans) == 4


def test_plans_are_forgotten_with_launch_configurations(following):
    one, calls = counted(lambda x: x + 1)
    for _ in range(3):
        one(torch.zeros(2))
    with tuning.trying({}):
        one(torch.zeros(2))
        assert len(calls) == 3
    one(torch.zeros(2))
    assert len(calls) == 4


def test_hooks_modes_and_autocast_are_heeded(following, monkeypatch):
    one, calls = counted(lambda x: x @ x)
    x = torch.randn(4, 4)
    for _ in range(3):
        one(x)
    assert len(calls) == 2
    with monkeypatch.context() as patched:
        patched.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
        one(x)
    assert len(calls) == 3
    with FlopCounterMode(display=False) as counter:
        one(x)
    assert len(calls) == 4 and counter.get_total_flops() == 2 * 4**3
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    one(x)
    assert len(calls) == 5


class AddressKernel:
    """Stands for a JIT function and its compiled kernel: out = 2·x of `size` fp32 values, by their addresses."""

    arg_names = ("x", "out", "size", "BLOCK")
    function, packed_metadata = 7, ()

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return self.through_triton

    def through_triton(self, x, out, size, **constants):
        self.run(*[0] * 9, x.data_ptr(), out.data_ptr(), size, constants["BLOCK"])
        return self

    def run(self, gx, gy, gz, stream, function, metadata, one, two, three, x, out, size, block):
        x, out = (a if isinstance(a, int) else a.data_ptr() for a in (x, out))
        self.seen.append((gx, stream, function, block, x % plans.ALIGNMENT, out))
        source, target = ((ctypes.c_float * size).from_address(a) for a in (x, out))
        for n, value in enumerate(source):
            target[n] = 2 * value


@pytest.mark.parametrize("pooled_bytes", [0, plans.POOLED_BYTES])
def test_launches_get_addresses(following, monkeypatch, pooled_bytes):
    monkeypatch.setattr(plans, "POOLED_BYTES", pooled_bytes)
    monkeypatch.setattr(launcher, "interpreting", lambda: False)
    monkeypatch.setattr(launcher, "current_stream", lambda device: 5)
    monkeypatch.setattr(plans, "current_stream", lambda device: 5)
    kernel, config = AddressKernel(), tuning.Config({"BLOCK": 64})

    @planned
    def four_times(x):
        first, second, out = torch.empty(130), torch.empty_like(x), torch.empty(2, x.numel())
        launch(kernel, (3, 1, 1), config, (x, first, x.numel()))
        launch(kernel, (4, 1, 1), config, (first, second, x.numel()))
        launch(kernel, (5, 1, 1), config, (second, out[1], x.numel()))
        return out[1].view(x.shape)

    for _ in range(4):
        kernel.seen.clear()
        x = torch.randn(5, 7)
        assert torch.equal(four_times(x), 8 * x)
    (plan,) = made()
    assert isinstance(plan, Plan) and plan.source.count("empty(") == (2 if pooled_bytes else 3)
    assert [call[:4] for call in kernel.seen] == [(n, 5, 7, 64) for n in (3, 4, 5)]
    if pooled_bytes:
        assert kernel.seen[1][5] - kernel.seen[0][5] == 2 * plans.ALIGNMENT  # 520 bytes, in two steps


def test_a_hooked_launch_goes_through_triton(monkeypatch):
    monkeypatch.setattr(launcher, "interpreting", lambda: False)
    monkeypatch.setattr(launcher, "current_stream", lambda device: 5)
    kernel, config, x = AddressKernel(), tuning.Config({"BLOCK": 64}), torch.randn(3)

    def stream_of_a_launch():
        launch(kernel, (1, 1, 1), config, (x, torch.empty(3), 3))
        return kernel.seen[-1][1]

    assert [stream_of_a_launch() for _ in range(2)] == [
        0,
        5,
    ]  # the first compiles; Triton's launch says stream 0 here
    with monkeypatch.context() as patched:
        patched.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
        assert stream_of_a_launch() == 0
    assert stream_of_a_launch() == 5


def test_spent_workspaces_are_released(following):
    def chain(x):
        for _ in range(50):
            x = x * 2
        return x

    one, _ = counted(chain)
    for _ in range(2):
        one(torch.ones(3))
    plan = made()[0]
    assert isinstance(plan, Plan)
    lines = plan.source.splitlines()
    assert sum(" = c" in line for line in lines) == 50
    made_at = [n for n, line in enumerate(lines) if "t5 = c" in line]
    assert "del t4" in lines[made_at[0] + 1]
