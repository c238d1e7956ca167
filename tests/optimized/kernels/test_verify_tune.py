import io

import pytest
import torch
from rich.console import Console

from megafold_bench.errors import UserError
from megafold_bench.outcomes import UnsupportedError
from optimized.kernels import tune, verify
from optimized.kernels.implementations import build
from optimized.kernels.problems import make_problem
from optimized.ops import tuning
from optimized.ops.tuning import Config
from reports.verdicts import print_tuned, print_verdict, print_verdicts

FORWARD, INPUT, WEIGHT = (
    f"transition.{kernel}/bfloat16/32" for kernel in ("forward", "input_gradient", "weight_gradient")
)


def written(show, *arguments):
    console = Console(width=150, record=True, file=io.StringIO())
    result = show(*arguments, console)
    return console.export_text(), result


def test_a_verdict_on_interpreted_kernels():
    row = verify.verify("transition", "fp32", "cpu")
    assert row["passed"] and row["differing"] == [] and 0 < row["error_ratio"] <= 1.1
    assert "interpreter" in row["how"] and row["values"] == 7


def test_wrong_kernels_fail(monkeypatch):
    def wrong(name, problem):
        return lambda t, mask: [1.02 * y for y in problem.definition(t, mask)]

    monkeypatch.setattr(verify, "build", wrong)
    row = verify.verify("triangle_attention", "bf16", "cpu")
    assert not row["passed"] and row["error_ratio"] > 1.1 and "N=19" in row["error_of"]


def test_what_is_not_a_number_is_infinitely_wrong():
    assert verify.ratios({"out": float("nan")}, {"out": 0.1})["out"] == float("inf")
    assert verify.ratios({"out": 1e-6}, {"out": 1e-9})["out"] < 1.1


def test_an_error_beyond_the_limit_is_judged_over_many_draws():
    def never(draw):
        raise AssertionError("one draw within the limit is enough")

    assert verify.judge(({"g": 1.0}, {"g": 1.0}), never) == {"g": 1.0}
    unlucky = verify.judge(({"g": 1.3}, {"g": 1.0}), lambda draw: ({"g": 1.0}, {"g": 1.0}))
    assert 1.0 < unlucky["g"] < verify.ALLOWED_RATIO
    wrong = verify.judge(({"g": 1.3}, {"g": 1.0}), lambda draw: ({"g": 1.2}, {"g": 1.0}))
    assert wrong["g"] > verify.ALLOWED_RATIO
    no_number = verify.judge(({"g": float("nan")}, {"g": 1.0}), lambda draw: ({"g": 1.0}, {"g": 1.0}))
    assert no_number["g"] == float("inf")


def test_the_definition_is_no_verdict(monkeypatch):
    monkeypatch.setattr("optimized.ops.support.interpreting", lambda: False)
    with pytest.raises(UnsupportedError, match="need a CUDA or ROCm device"):
        verify.verify("transition", "fp32", "cpu")


def test_printed_verdicts():
    good = {"op": "a", "dtype": "bf16", "outcome": "ok", "detail": "", "passed": True, "error_ratio": 0.7,
            "error_of": "out", "differing": [], "repeats": 5, "how": "somehow"}  # fmt: skip
    bad = {**good, "passed": False, "differing": ["d_q"]}
    crash = {"op": "a", "dtype": "bf16", "outcome": "crash", "detail": "died from SIGSEGV"}
    absent = {**crash, "outcome": "unsupported", "detail": "no GPU: the definition would run"}
    assert "right: worst error 0.70" in written(print_verdict, good)[0]
    assert "repeats differ in d_q" in written(print_verdict, bad)[0]
    assert "FAILED: crash: died" in written(print_verdict, crash)[0]
    assert "the definition runs: no GPU\n" in written(print_verdict, absent)[0]
    text, right = written(print_verdicts, [good, absent])
    assert text.startswith("1 right (somehow), 0 failed, 1 run the definition here\n") and right
    assert written(print_verdicts, [good, bad, crash])[1] is False


def problem_and_function():
    problem = make_problem("transition", 5, "bf16", "cpu", small=True)
    return problem, build("megafold", problem)


def test_what_each_pass_looks_up():
    problem, fn = problem_and_function()
    found = tune.entries_by_pass(fn, problem)
    assert set(found["fwd"]) == {FORWARD} and set(found["bwd"]) == {INPUT, WEIGHT}


def test_a_configuration_is_launched_while_it_is_tried():
    problem, fn = problem_and_function()
    config = Config({"BM": 16, "BN": 16, "STAGES": 1}, 4)
    with tuning.trying({FORWARD: config}) as trials:
        fn(problem.tensors, None)
        from optimized.ops.transition.launch import _config

        assert _config("forward", problem.tensors["x"].view(-1, 32), torch.bfloat16) == config
    assert FORWARD in trials.seen and trials.seen[FORWARD] != config
    assert _config("forward", problem.tensors["x"].view(-1, 32), torch.bfloat16) == trials.seen[FORWARD]


def test_neighbours_are_one_step_away():
    start = Config({"ROWS": 1, "BQ": 128, "BK": 16, "STAGES": 2}, 8)
    found = list(tune.neighbours(start))
    assert len({str(c.to_json()) for c in found}) == len(found) and start not in found
    assert {c.constants["BQ"] for c in found} == {64, 128} and {c.constants["BK"] for c in found} == {16, 32}
    assert {c.num_warps for c in found} == {4, 8} and {c.constants["ROWS"] for c in found} == {1, 2}


def test_the_fastest_right_configuration_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGAFOLD_BENCH_CACHE", str(tmp_path))
    problem, fn = problem_and_function()
    start = tune.entries_by_pass(fn, problem)["fwd"][FORWARD]
    seconds = {(64, 4): 3.0, (16, 4): 1.0, (64, 8): 0.5}

    def fake_times(self, name, device, repeat_ms):
        with_config = tuning.lookup("transition.forward", ("bfloat16", 32), torch.device("cpu"), start)
        return [seconds.get((with_config.constants["BM"], with_config.num_warps), 9.0)] * 3

    def steps(config):
        for rows, warps in ((16, 4), (64, 8)):  # the second is refused: 64 rows for 8 warps
            yield Config({**config.constants, "BM": rows}, warps)

    monkeypatch.setattr(tune.Passes, "times", fake_times)
    monkeypatch.setattr(tune, "neighbours", steps)
    expected = tune.outputs_and_gradients(fn, problem)
    row = tune.Search(fn, problem, "fwd", expected).run(FORWARD, start, deadline=float("inf"))
    assert row["chosen"]["constants"]["BM"] == 16 and row["chosen_s"] == 1.0
    assert row["default_s"] == seconds[start.constants["BM"], start.num_warps]
    stored = tuning.read_configs(tmp_path / "tuning" / "cpu.json")
    assert stored[FORWARD].constants["BM"] == 16


def test_a_configuration_with_another_result_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGAFOLD_BENCH_CACHE", str(tmp_path))
    problem, fn = problem_and_function()
    expected = {name: value + 0.1 for name, value in tune.outputs_and_gradients(fn, problem).items()}
    start = tune.entries_by_pass(fn, problem)["fwd"][FORWARD]
    assert tune.Search(fn, problem, "fwd", expected)._measure(FORWARD, start) == float("inf")


def test_tuning_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(tune, "detect_accelerator", lambda: "cpu")
    with pytest.raises(UserError, match="tune times kernels on a GPU"):
        tune.Plan.parse(None, None, None, 300.0)
    with pytest.raises(UserError, match="--budget"):
        tune.Plan.parse(None, None, None, 0.0)


def test_printed_choices():
    config = Config({"BM": 16}, 4)
    entry = {"entry": "k/bf16/128", "pass": "fwd", "default": config.to_json(),
             "chosen": Config({"BM": 32}, 8, max_registers=128).to_json(), "default_s": 2e-3, "chosen_s": 1e-3,
             "candidates": 7}  # fmt: skip
    row = {
        "op": "a",
        "dtype": "bf16",
        "tokens": 384,
        "outcome": "ok",
        "entries": [entry],
        "cache": "/c/x.json",
    }
    text = written(print_tuned, row)[0]
    assert "BM=16 warps=4" in text and "BM=32 warps=8 registers≤128" in text and "1.00 ms" in text
    failed = {**row, "outcome": "crash", "detail": "died"}
    assert "crash: died" in written(print_tuned, failed)[0]
