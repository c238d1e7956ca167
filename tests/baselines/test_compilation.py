import pytest
import torch
import torch._dynamo.testing
from torch import nn

from baselines.compilation import compile_units, compiler_support, strict_compilation


def test_support_says_why_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C++ compiler" in compiler_support("cpu").reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA" in compiler_support("cuda").reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("baselines.compilation.find_spec", lambda name: None)
    assert "Triton" in compiler_support("cuda").reason


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


def test_blocks_of_a_class_compile_once(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    blocks = nn.ModuleList(Block() for _ in range(5))
    x = torch.randn(3, 4, requires_grad=True)
    expected = x
    for block in blocks:
        expected = block(expected)
    counter = torch._dynamo.testing.CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kw: compile_(function, backend=counter, **kw))
    compile_units((str(i), b) for i, b in enumerate(blocks))
    with strict_compilation():
        for block in blocks:
            x = block(x)
    assert counter.frame_count == 1
    assert torch.allclose(x, expected)


def test_a_graph_break_is_an_error():
    unit = Breaks()
    compile_units([("breaks", unit)])
    with strict_compilation(), pytest.raises(torch._dynamo.exc.Unsupported):
        unit(torch.ones(3))
