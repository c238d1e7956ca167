"""Whether an operator's kernels are right on this machine: errors against fp64, and repeats that agree bit for bit."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafold_bench.environment import detect_accelerator
from megafold_bench.errors import UserError
from optimized.kernels.implementations import build
from optimized.kernels.measure import differing, errors_against_fp64
from optimized.kernels.names import parse_list
from optimized.kernels.problem import DTYPES, Problem
from optimized.kernels.problems import make_problem, parse_dtypes, parse_operators
from optimized.kernels.processes import Row, run_group, task
from optimized.ops.support import interpreting

ALLOWED_RATIO = 1.1
"""Errors may be this multiple of the eager definition's in the same dtype."""
ROUNDING = 2e-6
"""Relative errors up to this are rounding in fp32 and always allowed."""


@dataclass(frozen=True)
class Effort:
    """Lengths (none of them only multiples of a tile), repeats, and whether the channels are few."""

    lengths: tuple[int, ...]
    repeats: int
    small: bool


DRAWS = 16
"""Errors beyond the limit are judged again over this many draws: see `judge`."""
ON_GPU = Effort((5, 48, 129, 200, 256), 20, False)
INTERPRETED = Effort((19,), 2, True)


def cases(op: str, dtype: str, device: str, effort: Effort, draw: int = 0) -> Iterator[tuple[str, Problem]]:
    """Problems with a mask, and where there is one also without it and with rows that are masked throughout."""
    for tokens in effort.lengths:
        problem = make_problem(op, tokens, dtype, device, seed=tokens + 1000 * draw, small=effort.small)
        yield f"N={tokens}", problem
        if problem.mask is None or tokens != effort.lengths[-1]:
            continue
        yield f"N={tokens}, no mask", replace(problem, mask=None)
        empty = problem.mask.clone()
        empty[:2] = False
        yield f"N={tokens}, masked rows", replace(problem, mask=empty)


Errors = tuple[dict[str, float], dict[str, float]]
"""By the name of an output or gradient: those of the kernels, those of the definition."""


def ratios(own: dict[str, float], definition: dict[str, float]) -> dict[str, float]:
    """Errors as multiples of the definition's; infinite where there is no number."""
    found = {name: own[name] / max(definition[name], ROUNDING / ALLOWED_RATIO) for name in own}
    return {name: value if value == value else float("inf") for name, value in found.items()}


def root_mean_square(draws: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of the errors of each name over the draws."""
    return {name: (sum(draw[name] ** 2 for draw in draws) / len(draws)) ** 0.5 for name in draws[0]}


def judge(errors: Errors, again: Callable[[int], Errors]) -> dict[str, float]:
    """Ratios of one draw of the inputs or, if one is beyond the limit, of `DRAWS` of them by root mean square.

    The norm of n rounding errors varies by 1/√(2n) from draw to draw: 9 % for a gradient of 64 values, nothing for one
    of 10⁵. `again` gives the errors of a further draw by its number.
    """
    once = ratios(*errors)
    if max(once.values()) <= ALLOWED_RATIO:
        return once
    own, definition = zip(errors, *(again(draw) for draw in range(1, DRAWS)), strict=True)
    return ratios(root_mean_square(own), root_mean_square(definition))


def verify(op: str, dtype: str, device: str) -> dict[str, Any]:
    """The verdict on one operator and dtype: `passed`, the worst ratio and where, what differed between repeats.

    Raises `UnsupportedError` where the definition would run instead.
    """
    interpreted = device != "cuda" and interpreting()
    effort = ON_GPU if device == "cuda" else INTERPRETED
    worst, where, odd, count = 0.0, "", set(), 0
    for label, problem in cases(op, dtype, device, effort):
        fn = build("megafold", problem)

        def again(draw: int, label: str = label) -> Errors:
            drawn = dict(cases(op, dtype, device, effort, draw))[label]
            return errors_against_fp64(build("megafold", drawn), drawn)

        for name, ratio in judge(errors_against_fp64(fn, problem), again).items():
            count += 1
            if ratio > worst:
                worst, where = ratio, f"{name} at {label}"
        odd |= set(differing(fn, problem, effort.repeats))
    return {
        "passed": worst <= ALLOWED_RATIO and not odd,
        "error_ratio": worst,
        "error_of": where,
        "values": count,
        "differing": sorted(odd),
        "repeats": effort.repeats,
        "lengths": list(effort.lengths),
        "how": "Triton's interpreter, few channels" if interpreted else "kernels on the GPU",
    }


TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Plan:
    """Which operators and dtypes are verified, on which device."""

    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: str

    @staticmethod
    def parse(op: str | None, dtype: str | None, device: str | None = None) -> "Plan":
        """From the words of the command line; UserError names what does not fit."""
        kind = device or detect_accelerator()
        if kind not in ("cuda", "cpu"):
            raise UserError(f"--device {kind}: choose cuda or cpu")
        return Plan(parse_operators(parse_list(op)), parse_dtypes(parse_list(dtype), tuple(DTYPES)), kind)


def run(plan: Plan) -> Iterator[Row]:
    """A row for each operator and dtype: each operator in a fresh process, so that a crash is a verdict too."""
    with tempfile.TemporaryDirectory() as folder:
        for op in plan.ops:
            tasks = [task("verdict", op=op, dtype=dtype, device=plan.device) for dtype in plan.dtypes]
            yield from run_group(tasks, Path(folder) / f"{op}.log", TIMEOUT_S)
