import pytest
import torch

from megafold_bench.errors import UserError
from megafold_bench.outcomes import UnsupportedError
from optimized.kernels.implementations import BUILDERS, build, implements
from optimized.kernels.measure import (
    Passes,
    Task,
    differing,
    errors_against_fp64,
    measure,
    outputs_and_gradients,
)
from optimized.kernels.problems import OPERATORS, make_problem, parse_operators, relative

GIGA, MEGA = 1e9, 1e6


@pytest.mark.parametrize("op", OPERATORS)
def test_problems_are_random_seeded_and_fit_their_definition(op):
    problem = make_problem(op, 12, "bf16", "cpu", small=True)
    again = make_problem(op, 12, "bf16", "cpu", small=True)
    assert all(torch.equal(value, again.tensors[name]) for name, value in problem.tensors.items())
    assert all(value.float().std() > 0 for value in problem.tensors.values())
    results = outputs_and_gradients(problem.definition, problem)
    outputs = [value for name, value in results.items() if name.startswith("out")]
    assert [y.shape for y in outputs] == [g.shape for g in problem.grads]
    assert set(results) == {
        *(n for n in results if n.startswith("out")),
        *(f"d_{n}" for n in problem.tensors),
    }
    if problem.mask is not None:
        assert problem.mask.any(-1).all() and not problem.mask.all()


def test_dtypes_see_the_same_numbers():
    wide = make_problem("transition", 6, "fp32", "cpu", small=True)
    narrow = make_problem("transition", 6, "fp16", "cpu", small=True)
    assert torch.equal(narrow.tensors["x"], wide.tensors["x"].half())


@pytest.mark.parametrize(
    ("op", "passes", "tflop", "megabytes", "giga_exps"),
    [
        ("triangle_attention", "fwd", 0.029, 155, 0.23),
        ("triangle_multiplication_outgoing", "fwd", 0.043, 340, None),
        ("transition", "fwd", 0.058, 75.5, None),
        ("transition", "bwd", 0.155, 113, None),
        ("layer_norm_linear", "fwd", 0.0195, 190, 0),
    ],
)
def test_counted_costs_at_384_tokens(op, passes, tflop, megabytes, giga_exps):
    cost = OPERATORS[op].cost(passes, 384, torch.bfloat16)
    assert cost.flops == pytest.approx(tflop * 1e12, rel=0.02)
    assert cost.bytes == pytest.approx(megabytes * MEGA, rel=0.02)
    if giga_exps is not None:
        assert cost.exps == pytest.approx(giga_exps * GIGA, rel=0.02)


def test_a_pass_of_both_is_their_sum():
    operator = OPERATORS["attention_pair_bias"]
    parts = [operator.cost(name, 100, torch.float32) for name in ("fwd", "bwd")]
    assert operator.cost("fwdbwd", 100, torch.float32) == parts[0] + parts[1]


def test_every_length_is_compiled(monkeypatch):
    """FlexAttention and torch.compile fell back to eager from the fourth length on, and were timed so."""
    lengths, compiled = range(5, 5 + 12), []

    def counting(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    once = torch.compile(lambda t, mask: [t["x"] * 2.0], backend=counting, dynamic=False)
    monkeypatch.setattr("optimized.kernels.measure.build", lambda name, problem: once)
    monkeypatch.setattr("optimized.kernels.measure.differing", lambda *_: [])
    torch._dynamo.reset()
    for n in lengths:
        measure(Task("transition", "compile", "fp32", n, ("fwd",), "cpu", small=True), {"tokens": 1})
    assert len(compiled) == len(lengths)


def test_operators_by_name():
    assert parse_operators(()) == tuple(OPERATORS)
    assert len(parse_operators(("triangle_multiplication", "transition"))) == 3
    with pytest.raises(UserError, match="--op softmax: choose from triangle_attention"):
        parse_operators(("softmax",))


@pytest.mark.parametrize("op", OPERATORS)
def test_the_kernels_are_called_as_the_definition_is(op):
    problem = make_problem(op, 11, "fp32", "cpu", small=True)
    own, definition = errors_against_fp64(build("megafold", problem), problem)
    assert own.keys() == definition.keys()
    assert max(own.values()) < 1e-5


def test_sdpa_agrees_with_the_definition():
    problem = make_problem("attention_pair_bias", 11, "fp32", "cpu", small=True)
    own, _ = errors_against_fp64(build("sdpa", problem), problem)
    assert max(own.values()) < 1e-5


def test_tf32x3_is_for_float32():
    own, _ = errors_against_fp64(
        build("megafold-tf32x3", make_problem("attention_pair_bias", 11, "fp32", "cpu", small=True)),
        make_problem("attention_pair_bias", 11, "fp32", "cpu", small=True),
    )
    assert max(own.values()) < 1e-5
    with pytest.raises(UnsupportedError, match="float32"):
        build("megafold-tf32x3", make_problem("attention_pair_bias", 11, "bf16", "cpu", small=True))


@pytest.mark.parametrize("name", ["cuequivariance", "trifast", "ds4sci", "flex"])
def test_peers_say_why_they_cannot_run(name):
    problem = make_problem("triangle_attention", 8, "bf16", "cpu", small=True)
    with pytest.raises(UnsupportedError, match="GPU"):
        build(name, problem)


def test_implementations_without_the_operator():
    assert not implements("flex", "transition")
    with pytest.raises(UnsupportedError, match="flex has no transition"):
        build("flex", make_problem("transition", 4, "bf16", "cpu", small=True))
    assert all(op in OPERATORS for builders in BUILDERS.values() for op in builders)


def test_repeats_that_differ_are_named():
    problem = make_problem("transition", 5, "fp32", "cpu", small=True)
    calls = iter(range(100))

    def drifts(t, mask):
        return [problem.definition(t, mask)[0] * (1 + 1e-3 * next(calls))]

    assert "d_x" in differing(drifts, problem, 3)
    assert differing(problem.definition, problem, 3) == []


def test_a_wrong_result_shows():
    problem = make_problem("transition", 5, "fp32", "cpu", small=True)
    own, _ = errors_against_fp64(lambda t, mask: [problem.definition(t, mask)[0] * 1.01], problem)
    assert own["out"] == pytest.approx(0.01, rel=1e-3) and own["d_w_a"] > 0.005
    assert relative(torch.tensor([float("nan")]), torch.ones(1)) != 0


def test_passes_are_timed_each_by_itself():
    problem = make_problem("transition", 5, "fp32", "cpu", small=True)
    passes = Passes(problem.definition, problem)
    for name in ("fwd", "bwd", "fwdbwd"):
        times = passes.times(name, "cpu", 1)
        assert len(times) >= 3 and all(t > 0 for t in times)
    assert not passes.forward()[0].requires_grad and passes.graph()[0].requires_grad
