import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from baselines.checkpointing import check_mode, checkpoint_units, has_dropout, recomputed
from megafold_bench.errors import UserError


class Block(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.calls = 0
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.dropout(torch.tanh(self.linear(x)))


@dataclass
class Holder:
    tensor: torch.Tensor


def run(stack: nn.Sequential) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(5)
    x = torch.randn(16, 8)
    out = stack(x).square().sum()
    out.backward()
    return out.detach(), [p.grad for p in stack.parameters()]


@pytest.mark.parametrize("mode", ["block", "reentrant"])
def test_same_numbers_with_dropout_twice_the_calls(mode):
    """The first block's input needs no gradient, its parameters do."""
    plain = nn.Sequential(Block(0.3), Block(0.3))
    wrapped = copy.deepcopy(plain)
    names = set(wrapped.state_dict())
    checkpoint_units(((str(i), m) for i, m in enumerate(wrapped)), mode)
    (a, grads_a), (b, grads_b) = run(plain), run(wrapped)
    assert torch.equal(a, b)
    assert all(torch.equal(g, h) for g, h in zip(grads_a, grads_b, strict=True))
    assert [m.calls for m in plain] == [1, 1]
    assert [m.calls for m in wrapped] == [2, 2]
    assert set(wrapped.state_dict()) == names


@pytest.mark.parametrize("mode", ["block", "reentrant"])
def test_no_gradient_no_second_run(mode):
    block = Block(0.0)
    checkpoint_units([("a", block)], mode)
    with torch.no_grad():
        block(torch.ones(1, 8))
    assert block.calls == 1


@pytest.mark.parametrize("mode", ["block", "reentrant"])
def test_only_inputs_are_kept(mode):
    saved: list[torch.Tensor] = []
    block = Block(0.0)
    function = recomputed(block.forward, mode=mode)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        function(x)
    assert {t.data_ptr() for t in saved if t.numel()} <= {x.data_ptr()}


@pytest.mark.parametrize(
    ("packed", "unpacked"),
    [
        (lambda t: {"a": [t]}, lambda held: held["a"][0]),
        (lambda t: (t,), lambda held: held[0]),
        (Holder, lambda held: held.tensor),
    ],
    ids=["dict", "tuple", "dataclass"],
)
@pytest.mark.parametrize("needs", [True, False])
def test_gradients_reach_tensors_inside_arguments_and_keywords(packed, unpacked, needs):
    """Reentrant checkpointing by itself would give them none, or run through their history twice."""
    x, y, z = (torch.full((3,), value, requires_grad=True) for value in (2.0, 3.0, 5.0))
    function = recomputed(lambda x, held, *, z: x * unpacked(held) * z, mode="reentrant")
    function(x, packed(y * 1 if needs else y.detach()), z=z * 1).sum().backward()
    assert x.grad.tolist() == [15.0] * 3
    assert z.grad.tolist() == [6.0] * 3
    assert (y.grad.tolist() == [10.0] * 3) if needs else (y.grad is None)


def test_reentrant_calls_no_hook_of_saved_tensors():
    """What it is for: one call of Python a unit, not one for each tensor that its graph saves."""
    counts = {}
    for mode in ("block", "reentrant"):
        x = torch.randn(4, 8, requires_grad=True)
        function = recomputed(Block(0.0).forward, mode=mode)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            function(x)
        counts[mode] = sum(row.key == "CheckpointFunction" for row in seen.key_averages())
    assert counts == {"block": 0, "reentrant": 1}


def test_none_is_the_function_itself():
    function = Block(0.0).forward
    assert recomputed(function, mode="none") == function


def test_dropout_is_noticed():
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    assert not has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


def test_unknown_mode():
    assert [check_mode(mode) for mode in ("none", "block", "reentrant")] == ["none", "block", "reentrant"]
    with pytest.raises(UserError, match="'layer'"):
        check_mode("layer")
