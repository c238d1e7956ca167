import math

import pytest
import torch

from baselines.optim import Optimizer, OptimizerConfig, learning_rate


def test_schedule():
    config = OptimizerConfig()
    assert learning_rate(config, 0) == pytest.approx(1.8e-6)
    assert learning_rate(config, 499) == pytest.approx(0.9e-3)
    assert learning_rate(config, 999) == learning_rate(config, 49_999) == pytest.approx(1.8e-3)
    assert learning_rate(config, 50_000) == pytest.approx(1.8e-3 * 0.95)
    assert learning_rate(config, 150_001) == pytest.approx(1.8e-3 * 0.95**3)


def test_adam_against_the_formula():
    start, gradients = 2.0, [0.3, -0.1, 0.7, 0.2]
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    config = OptimizerConfig(lr=0.1, warmup_steps=2)
    optimizer = Optimizer([p], config)
    m = v = 0.0
    x = start
    for step, g in enumerate(gradients):
        p.grad = torch.tensor(g, dtype=torch.float64)
        norm = optimizer.step(step)
        assert norm.item() == pytest.approx(abs(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        x -= learning_rate(config, step) * m_hat / (math.sqrt(v_hat) + 1e-8)
        assert p.item() == pytest.approx(x, rel=1e-9)


def test_clipping_is_by_the_global_norm():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([30.0, 0.0]), torch.tensor([40.0])
    norm = Optimizer(parameters, OptimizerConfig()).step(0)
    assert norm.item() == pytest.approx(50.0)
    assert parameters[0].grad[0].item() == pytest.approx(6.0, rel=1e-4)
    assert parameters[1].grad[0].item() == pytest.approx(8.0, rel=1e-4)


def test_average_follows_the_weights():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Optimizer([p], OptimizerConfig(lr=0.5, warmup_steps=1, ema_decay=0.9))
    expected = 1.0
    for step in range(3):
        p.grad = torch.tensor([1.0])
        optimizer.step(step)
        expected = 0.9 * expected + 0.1 * p.item()
    assert optimizer.average is not None
    assert optimizer.average[0].item() == pytest.approx(expected, rel=1e-6)
    assert Optimizer([p], OptimizerConfig()).average is None
