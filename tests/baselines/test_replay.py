"""What repeats in a step, without a recorder, and where graphs are refused."""

import pytest
import torch

from baselines.replay import Recorder, Repeated
from baselines.systems import PYTORCH
from megafold_bench.outcomes import UnsupportedError


def test_without_a_recorder_gradients_are_those_of_the_function():
    weight = torch.randn(5, requires_grad=True)
    inputs = torch.randn(3, 4, 5)
    repeated = Repeated(lambda x: (x * weight).square().sum(-1), None)
    for x in inputs:
        y = repeated(x)
        assert y.is_leaf and y.requires_grad
        y.sin().sum().backward()
        repeated.backward(y.grad)
    found, weight.grad = weight.grad, None
    (inputs * weight).square().sum(-1).sin().sum().backward()
    torch.testing.assert_close(found, weight.grad)


def test_without_gradients():
    weight = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        assert not Repeated(lambda x: x * weight, None)(torch.ones(5)).requires_grad


def test_graphs_are_refused_without_a_gpu():
    with pytest.raises(UnsupportedError, match="needs a CUDA or ROCm device, not cpu"):
        Recorder(torch.device("cpu"))
    factors = PYTORCH.resolve({"preset": "tiny", "graphs": True}, 16)
    with pytest.raises(UnsupportedError):
        PYTORCH.build(factors, 16, 0, "cpu")


def test_graphs_are_a_factor_only_where_they_are_on():
    assert "graphs" not in PYTORCH.resolve({"preset": "tiny", "graphs": "false"}, 16)
    assert PYTORCH.resolve({"preset": "tiny", "graphs": "true"}, 16)["graphs"] is True
