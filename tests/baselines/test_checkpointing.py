import copy

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


def run(stack: nn.Sequential) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(5)
    x = torch.randn(16, 8)
    out = stack(x).square().sum()
    out.backward()
    return out.detach(), [p.grad for p in stack.parameters()]


def test_same_numbers_with_dropout_twice_the_calls():
    plain = nn.Sequential(Block(0.3), Block(0.3))
    wrapped = copy.deepcopy(plain)
    names = set(wrapped.state_dict())
    checkpoint_units((str(i), m) for i, m in enumerate(wrapped))
    (a, grads_a), (b, grads_b) = run(plain), run(wrapped)
    assert torch.equal(a, b)
    assert all(torch.equal(g, h) for g, h in zip(grads_a, grads_b, strict=True))
    assert [m.calls for m in plain] == [1, 1]
    assert [m.calls for m in wrapped] == [2, 2]
    assert set(wrapped.state_dict()) == names


def test_no_gradient_no_second_run():
    block = Block(0.0)
    checkpoint_units([("a", block)])
    with torch.no_grad():
        block(torch.ones(1, 8))
    assert block.calls == 1


def test_only_inputs_are_kept():
    saved: list[torch.Tensor] = []
    block = Block(0.0)
    function = recomputed(block.forward)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        function(x)
    assert {t.data_ptr() for t in saved if t.numel()} <= {x.data_ptr()}


def test_dropout_is_noticed():
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    assert not has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


def test_unknown_mode():
    assert check_mode("block") == "block"
    with pytest.raises(UserError, match="'layer'"):
        check_mode("layer")
