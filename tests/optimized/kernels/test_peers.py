"""The peers as the microbenchmarks call them: values and gradients of the problem's definition, on stand-ins."""

import pytest
import torch

from megafold_bench.outcomes import UnsupportedError
from optimized.kernels import peers
from optimized.kernels.implementations import build
from optimized.kernels.measure import outputs_and_gradients
from optimized.kernels.problems import make_problem, relative
from tests.baselines.peer_fixtures import fake_cuequivariance, fake_trifast, flex_on_the_cpu

N = 9


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    fake_trifast(monkeypatch)
    fake_cuequivariance(monkeypatch)


@pytest.mark.parametrize(
    ("builder", "op", "small"),
    [
        (peers.trifast, "triangle_attention", False),
        (peers.cuequivariance_attention, "triangle_attention", True),
        (peers.cuequivariance_triangle, "triangle_multiplication_outgoing", True),
        (peers.cuequivariance_triangle, "triangle_multiplication_incoming", True),
    ],
)
def test_agrees_with_the_definition(builder, op, small):
    problem = make_problem(op, N, "fp32", "cpu", small=small)
    found = outputs_and_gradients(builder(problem), problem)
    for name, value in outputs_and_gradients(problem.definition, problem).items():
        assert relative(found[name], value) < 1e-5, name


def test_flex_agrees_with_the_definition(monkeypatch):
    flex_on_the_cpu(monkeypatch)
    problem = make_problem("triangle_attention", N, "fp32", "cpu", small=True)
    function = peers._attention(peers.peers.flex_attention())
    found = outputs_and_gradients(function, problem)
    for name, value in outputs_and_gradients(problem.definition, problem).items():
        assert relative(found[name], value) < 1e-5, name


@pytest.mark.parametrize(
    ("name", "op", "small", "reason"),
    [
        ("trifast", "triangle_attention", True, "as many rows as tokens, not 3 rows"),
        ("cuequivariance", "attention_pair_bias", True, "float32 heads: multiples of 4 to 32, not 48"),
    ],
)
def test_a_problem_a_peer_does_not_take(name, op, small, reason):
    problem = make_problem(op, N, "fp32", "cpu", small=small)
    builder = {"trifast": peers.trifast, "cuequivariance": peers.cuequivariance_attention}[name]
    with pytest.raises(UnsupportedError, match=reason):
        builder(problem)
    with pytest.raises(UnsupportedError, match=f"{name} needs a GPU"):
        build(name, problem)


def test_bfloat16_stays_bfloat16():
    problem = make_problem("triangle_attention", N, "bf16", "cpu", small=True)
    (out,) = peers.cuequivariance_attention(problem)(problem.tensors, problem.mask)
    assert out.dtype == torch.bfloat16
