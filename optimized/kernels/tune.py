"""Which launch configuration is fastest on this device: neighbours of the best known, kernel by kernel.

An operator's kernels are found by running it and noting what it looks up. A kernel of the forward pass is judged by
the time of the forward pass, another by that of the backward pass; a configuration whose results differ is left out.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megafold_bench.environment import detect_accelerator
from megafold_bench.errors import UserError
from megafold_bench.outcomes import UnsupportedError
from optimized.kernels.implementations import build
from optimized.kernels.measure import Passes, outputs_and_gradients
from optimized.kernels.names import parse_list, parse_tokens
from optimized.kernels.problem import Function, Problem
from optimized.kernels.problems import (
    make_problem,
    parse_dtypes,
    parse_operators,
    relative,
)
from optimized.kernels.processes import Row, run_group, task
from optimized.ops import tuning
from optimized.ops.tuning import Config

TILES = ("BM", "BN", "BQ", "BK")
SMALLEST_TILE, LARGEST_TILE = 16, 128
MOST_ROWS = 8
MOST_STAGES = 4
REGISTER_CAPS = (0, 128, 168)
REPEAT_MS = 40
SAME_RESULT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Results of two configurations differ by rounding only, far less than this."""


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations one step away: a tile side or the warps halved or doubled, a stage or row more or less, a cap."""
    for name, value in config.constants.items():
        for changed in _steps(name, value):
            yield replace(config, constants={**config.constants, name: changed})
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 2 <= warps <= 8:
            yield replace(config, num_warps=warps)
    for cap in REGISTER_CAPS:
        if cap != config.max_registers:
            yield replace(config, max_registers=cap)


def _steps(name: str, value: int) -> list[int]:
    if name in TILES:
        return [v for v in (value // 2, value * 2) if SMALLEST_TILE <= v <= LARGEST_TILE]
    if name == "ROWS":
        return [v for v in (value // 2, value * 2) if 1 <= v <= MOST_ROWS]
    if name == "STAGES":
        return [v for v in (value - 1, value + 1) if 1 <= v <= MOST_STAGES]
    return []


def entries_by_pass(fn: Function, problem: Problem) -> dict[str, dict[str, Config]]:
    """What a forward pass looks up, and what a backward pass looks up beyond it: entry to configuration."""
    passes = Passes(fn, problem)
    with tuning.trying({}) as first:
        outputs = passes.graph()
    with tuning.trying({}) as second:
        passes.backward(outputs)
    later = {entry: config for entry, config in second.seen.items() if entry not in first.seen}
    return {"fwd": dict(first.seen), "bwd": later}


class Search:
    """The search for one kernel's configuration, the others as they are."""

    def __init__(self, fn: Function, problem: Problem, name: str, expected: dict[str, Tensor]) -> None:
        self._fn, self._problem, self._pass, self._expected = fn, problem, name, expected
        self._device = next(iter(problem.tensors.values())).device

    def _measure(self, entry: str, config: Config) -> float:
        """Seconds of the pass with this configuration; infinite where it is refused or gives something else."""
        tolerance = SAME_RESULT[next(iter(self._problem.tensors.values())).dtype]
        with tuning.trying({entry: config}):
            try:
                results = outputs_and_gradients(self._fn, self._problem)
            except ValueError:  # `launching.checked`
                return math.inf
            if any(not relative(results[n], value) <= tolerance for n, value in self._expected.items()):
                return math.inf
            del results
            times = Passes(self._fn, self._problem).times(self._pass, self._device.type, REPEAT_MS)
        return sorted(times)[len(times) // 2]

    def run(self, entry: str, start: Config, deadline: float) -> dict[str, Any]:
        """Walk to the fastest neighbour until none is faster or time is up; record it and say what was tried."""
        op, *key = entry.split("/")
        best, tried = start, {_name(start)}
        before = after = math.nan
        while True:
            fresh = [config for config in neighbours(best) if _name(config) not in tried]
            chosen, times = tuning.tune(
                op, key, self._device, [best, *fresh],
                run=lambda config: config,  # handed through to `measure`, which runs and judges it
                measure=lambda handed: self._measure(entry, handed()),  # type: ignore[arg-type]
            )  # fmt: skip
            tried |= {_name(config) for config in fresh}
            after = min(times.values())
            if math.isnan(before):
                before = times[_name(start)]
            if chosen == best or time.monotonic() > deadline:
                break
            best = chosen
        return {
            "entry": entry,
            "pass": self._pass,
            "default": start.to_json(),
            "chosen": chosen.to_json(),
            "default_s": before,
            "chosen_s": after,
            "candidates": len(tried),
        }


def _name(config: Config) -> str:
    """The key of `tuning.tune`'s times."""
    return json.dumps(config.to_json(), sort_keys=True)


def tune_operator(op: str, dtype: str, tokens: int, device: str, budget_s: float) -> dict[str, Any]:
    """Tune every kernel of an operator at a length; the rows of `Search.run`, in the order they are launched.

    Each kernel gets an equal share of the budget; a round of candidates that has begun is finished.
    """
    problem = make_problem(op, tokens, dtype, device)
    fn = build("megafold", problem)
    found: list[dict[str, Any]] = []
    looked_up = entries_by_pass(fn, problem)
    share_s = budget_s / max(1, sum(map(len, looked_up.values())))
    expected = outputs_and_gradients(fn, problem)
    for name, entries in looked_up.items():
        for entry, config in entries.items():
            deadline = time.monotonic() + share_s
            found.append(Search(fn, problem, name, expected).run(entry, config, deadline))
    if not found:
        raise UnsupportedError(f"{op} in {dtype} looks no launch configuration up")
    return {
        "entries": found,
        "cache": str(tuning.user_cache_dir() / f"{tuning.device_name(torch.device(device))}.json"),
    }


DEFAULT_TOKENS = (384, 768)


@dataclass(frozen=True)
class Plan:
    """What is tuned, and for how long."""

    ops: tuple[str, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    budget_s: float

    @staticmethod
    def parse(op: str | None, n: str | None, dtype: str | None, budget_s: float) -> "Plan":
        """From the words of the command line; UserError names what does not fit, or says that there is no GPU."""
        ops, tokens = parse_operators(parse_list(op)), parse_tokens(n) or DEFAULT_TOKENS
        dtypes = parse_dtypes(parse_list(dtype), ("bf16",))
        if not budget_s > 0:
            raise UserError(f"--budget {budget_s:g}: give seconds above 0")
        if detect_accelerator() != "cuda":
            raise UserError("tune times kernels on a GPU and none is usable here: see megafold-bench doctor")
        return Plan(ops, tokens, dtypes, budget_s)


def run(plan: Plan) -> Iterator[Row]:
    """A row for each operator, dtype and length, each operator and dtype in a fresh process.

    Where kernels are looked up without the length, the last length's configuration stays.
    """
    with tempfile.TemporaryDirectory() as folder:
        for op in plan.ops:
            for dtype in plan.dtypes:
                tasks = [
                    task("tuning", op=op, dtype=dtype, tokens=n, device="cuda", budget_s=plan.budget_s)
                    for n in plan.tokens
                ]
                yield from run_group(tasks, Path(folder) / f"{op}-{dtype}.log", 3 * plan.budget_s + 300)
