"""One GPU call for the operators outside the Pairformer's core: errors, repeatability, time and memory.

python bench/ops_lab.py --out DIR      (under 90 s on one H200; a crash costs one group, the rest is reported)

Conditioned transition and adaptive LayerNorm of the diffusion transformer, gated output, outer product mean and
pair-weighted averaging, each at AF3 sizes against its definition, eager and compiled: error against float64 over
the eager error, bitwise repeats, median of `do_bench` forward and forward with backward, peak memory, host time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.adaptive_layer_norm import adaptive_layer_norm, adaptive_layer_norm_reference
from optimized.ops.conditioned_transition import (
    ConditionedWeights,
    conditioned_transition,
    conditioned_transition_reference,
)
from optimized.ops.gated_output import (
    add_update,
    add_update_reference,
    conditioned_output,
    conditioned_output_reference,
    gated_output,
    gated_output_reference,
)
from optimized.ops.outer_product_mean import projected_outer, projected_outer_reference
from optimized.ops.pair_weighted_averaging import weighted_average, weighted_average_reference

BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
START = time.time()
Fn = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One operator at one size: function, definition, inputs of both and the gradient of the result."""

    name: str
    ours: Fn
    definition: Fn
    tensors: list[Tensor]
    grad: Tensor
    floor_ms: tuple[float, float]
    """What forward, and forward with backward, would take at full bandwidth and full matrix rate."""


def floor(passes: float, elements: float, size: int, flop: float) -> float:
    """Milliseconds for `passes` over `elements` values of `size` bytes, or for `flop`, whichever is longer."""
    return max(passes * elements * size / 4.27e12, flop / (790e12 if size == 2 else 55e12)) * 1e3


def random(seed: int) -> Fn:
    """A source of normal numbers on the GPU."""
    g = torch.Generator("cuda").manual_seed(seed)
    return lambda *shape: torch.randn(*shape, device="cuda", generator=g)


def matrices(normal: Fn, *shapes: tuple[int, int]) -> list[Tensor]:
    """Weights of unit gain."""
    return [normal(*shape) / shape[1] ** 0.5 for shape in shapes]


def conditioned_cases(n: int, samples: int, dtype: torch.dtype, atoms: bool) -> list[Case]:
    """The three conditioned operators, on tokens (768 channels, 384 of s) or atoms (128, s shared by samples)."""
    normal = random(n + samples)
    rows, c, cs = (9 * n, 128, 128) if atoms else (n, 768, 384)
    own = (rows,) if atoms else (samples, rows)
    a, s = (normal(samples, rows, c) * 2).to(dtype), normal(*own, cs).to(dtype)
    grad = normal(samples, rows, c).to(dtype)
    w = matrices(normal, (c, cs), (c, cs), (2 * c, c), (2 * c, c), (c, 2 * c), (c, cs), (c, c))
    gamma, bias, gate_bias = 1 + 0.2 * normal(cs), 0.5 * normal(c), normal(c) - 1
    adaptive = [gamma, w[0], bias, w[1]]
    label = f"{'atoms' if atoms else 'tokens'} {samples}x{rows} {str(dtype).removeprefix('torch.')}"
    size, total, shared = dtype.itemsize, samples * rows * c, (1 if atoms else samples) * rows * c
    project = 2.0 * shared * cs

    def transition(fn: Fn) -> Fn:
        return lambda a, s, *p: fn(a, s, ConditionedWeights(*p))

    ffn, gate = 2.0 * total * 6 * c, normal(samples, rows, c).to(dtype)
    return [
        Case(
            f"conditioned_transition {label}",
            transition(conditioned_transition),
            transition(conditioned_transition_reference),
            [a, s, *adaptive, w[2], w[3], w[4], w[5], gate_bias],
            grad,
            (floor(16, total, size, ffn + 3 * project), floor(40, total, size, 3 * (ffn + 3 * project))),
        ),
        Case(
            f"adaptive_layer_norm {label}",
            adaptive_layer_norm,
            adaptive_layer_norm_reference,
            [a, s, *adaptive],
            grad,
            (
                floor(2, total + shared, size, 2 * project),
                floor(5, total + 2 * shared, size, 6 * project),
            ),
        ),
        Case(
            f"conditioned_output {label}",
            conditioned_output,
            conditioned_output_reference,
            [a, gate, w[6], s, w[5], gate_bias],
            grad,
            (
                floor(6, total, size, 2.0 * total * c + project),
                floor(18, total, size, 6.0 * total * c + 3 * project),
            ),
        ),
    ]


def output_cases(n: int) -> list[Case]:
    """The end of triangle attention with row-shared dropout, and of triangle multiplication, at 128 channels."""
    normal, c = random(n), 128
    x, g, z, grad = (normal(n, n, c).to(BF) for _ in range(4))
    keep = ((normal(1, n, c) > -0.67) / 0.75).to(BF)
    (w,) = matrices(normal, (c, c))
    total, flop = float(n * n * c), 2.0 * n * n * c * c
    return [
        Case(
            f"gated_output {n}",
            lambda x, g, w, z: gated_output(x, g, w, z, keep),
            lambda x, g, w, z: gated_output_reference(x, g, w, z, keep),
            [x, g, w, z],
            grad,
            (floor(4, total, 2, flop), floor(9, total, 2, 3 * flop)),
        ),
        Case(
            f"add_update {n}",
            lambda z, u: add_update(z, u, keep),
            lambda z, u: add_update_reference(z, u, keep),
            [z, x],
            grad,
            (floor(3, total, 2, 0.0), floor(5, total, 2, 0.0)),
        ),
    ]


def outer_cases(n: int, rows: int) -> list[Case]:
    """The outer product mean behind its projections, 32 hidden and 128 pair channels."""
    normal, c, z = random(n), 32, 128
    a, b, grad = normal(rows, n, c).to(BF), normal(rows, n, c).to(BF), normal(n, n, z).to(BF)
    (w,), bias = matrices(normal, (z, c * c)), 0.3 * normal(z)
    scale = torch.full((n, n), 1.0 / rows, device="cuda")
    outer, project = 2.0 * rows * n * n * c * c, 2.0 * n * n * c * c * z
    return [
        Case(
            f"outer_product_mean {rows}x{n}",
            lambda a, b, w, bias: projected_outer(a, b, w, bias, scale),
            lambda a, b, w, bias: projected_outer_reference(a, b, w, bias, scale.to(a.dtype)),
            [a, b, w, bias],
            grad,
            (floor(0, 0, 2, outer + project), floor(0, 0, 2, 4 * outer + 3 * project)),
        )
    ]


def averaging_cases(n: int, rows: int, width: int) -> list[Case]:
    """Pair-weighted averaging between its projections, 8 heads."""
    normal, heads = random(n + width), 8
    v, grad = normal(rows, n, heads, width).to(BF), normal(rows, n, heads, width).to(BF)
    logits = normal(n, n, heads).to(BF)
    mask = normal(n) > -1.2
    total, flop = float(rows * n * heads * width), 2.0 * rows * n * n * heads * width
    return [
        Case(
            f"pair_weighted_averaging {rows}x{n}x{heads}x{width}",
            lambda v, x: weighted_average(v, x.movedim(-1, 0), mask),
            lambda v, x: weighted_average_reference(v, x.movedim(-1, 0), mask),
            [v, logits],
            grad,
            (floor(2, total, 2, flop), floor(6, total, 2, 3 * flop)),
        )
    ]


def both_passes(fn: Fn, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The result, then the gradients of all leaves."""
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The inputs as leaves, in another dtype if one is given."""
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in case.tensors]


def check(case: Case) -> dict[str, Any]:
    """Error against fp64 of every result over the definition's, the worst of them, and repeatability."""
    exact = both_passes(case.definition, leaves_of(case, torch.float64), case.grad)
    ours, again = (both_passes(case.ours, leaves_of(case), case.grad) for _ in range(2))
    eager = both_passes(case.definition, leaves_of(case), case.grad)

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a.double() - b).norm() / b.norm()).item()

    pairs = [(distance(a, d), distance(e, d)) for a, e, d in zip(ours, eager, exact, strict=True)]
    worst = max(range(len(pairs)), key=lambda k: pairs[k][0] / max(pairs[k][1], 1e-30))
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    ratio = pairs[worst][0] / max(pairs[worst][1], 1e-30)
    return {"pairs": pairs, "worst": worst, "ratio": ratio, "bitwise": same}


def measure(fn: Fn, case: Case) -> dict[str, float]:
    """Milliseconds forward and forward with backward, peak MiB above the inputs, host ms of both passes."""
    leaves = leaves_of(case)

    def forward() -> None:
        with torch.no_grad():
            fn(*leaves)

    both_passes(fn, leaves, case.grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    held = both_passes(fn, leaves, case.grad)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    del held
    begun = time.perf_counter()
    for _ in range(5):
        both_passes(fn, leaves, case.grad)
    host = (time.perf_counter() - begun) / 5 * 1e3
    torch.cuda.synchronize()
    return {
        "fwd": do_bench(forward, warmup=5, rep=20, return_mode="median"),
        "fwd_bwd": do_bench(
            lambda: both_passes(fn, leaves, case.grad), warmup=5, rep=40, return_mode="median"
        ),
        "peak_mib": peak,
        "host": host,
    }


@dataclass(frozen=True)
class Group:
    """Cases to time, and smaller ones to check against fp64."""

    name: str
    timed: Callable[[], list[Case]]
    checked: Callable[[], list[Case]]


GROUPS = [
    Group(
        "tokens fp32, chunk of 4",
        lambda: conditioned_cases(384, 4, FULL, False),
        lambda: conditioned_cases(96, 3, FULL, False),
    ),
    Group(
        "tokens bf16, 48 samples",
        lambda: conditioned_cases(384, 48, BF, False),
        lambda: conditioned_cases(96, 3, BF, False),
    ),
    Group(
        "atoms fp32, chunk of 4",
        lambda: conditioned_cases(384, 4, FULL, True),
        lambda: conditioned_cases(32, 3, FULL, True),
    ),
    Group(
        "atoms bf16, chunk of 4",
        lambda: conditioned_cases(768, 4, BF, True),
        lambda: conditioned_cases(32, 3, BF, True),
    ),
    Group("output 384", lambda: output_cases(384), lambda: output_cases(101)),
    Group("output 768", lambda: output_cases(768), lambda: output_cases(150)),
    Group("outer 384", lambda: outer_cases(384, 1024), lambda: outer_cases(75, 96)),
    Group("outer 768", lambda: outer_cases(768, 1024), lambda: outer_cases(200, 40)),
    Group("averaging 384", lambda: averaging_cases(384, 1024, 8), lambda: averaging_cases(77, 50, 8)),
    Group("averaging 768", lambda: averaging_cases(768, 1024, 8), lambda: averaging_cases(300, 12, 8)),
    Group("averaging wide", lambda: averaging_cases(384, 1024, 32), lambda: averaging_cases(150, 20, 32)),
]
# Averages of 1024 rows and outer products in fp64 would not fit the time: the checks are small.


def emit(text: str, row: dict[str, Any]) -> None:
    """One result for the parent."""
    print("@" + json.dumps({"text": text, "row": row}), flush=True)


@contextmanager
def reported(case: Case, what: str) -> Iterator[None]:
    """An error inside becomes a result, and the next thing is tried."""
    try:
        yield
    except Exception as error:
        text = f"{case.name} {what}: {type(error).__name__} {str(error)[:160]}"
        emit(text, {"name": case.name, "arm": what, "error": traceback.format_exc()[-2000:]})


def prepare(index: int, compiled: bool) -> None:
    """One group's checks as JSON lines; then everything it times once, which fills the compilers' caches."""
    torch.backends.cuda.matmul.allow_tf32 = False
    group = GROUPS[index]
    for case in group.checked():
        with reported(case, "check"):
            found = check(case)
            ours, eager = found["pairs"][found["worst"]]
            emit(
                f"check {case.name}: worst result {found['worst']} {ours:.2e} eager {eager:.2e}"
                f" ratio {found['ratio']:.2f} bitwise {found['bitwise']}",
                {"name": case.name, "check": found},
            )
    for case in group.timed():
        for fn in (case.ours, *([torch.compile(case.definition, dynamic=False)] if compiled else [])):
            with reported(case, "first call"):
                both_passes(fn, leaves_of(case), case.grad)
                with torch.no_grad():
                    fn(*leaves_of(case))
    torch.cuda.synchronize()


def time_case(case: Case, compiled: bool, deadline: float) -> None:
    """The times of one case; an arm that raises is reported and the others still run."""
    arms = {"ours": case.ours, "eager": case.definition}
    if compiled:
        arms["compiled"] = torch.compile(case.definition, dynamic=False)
    floors = "/".join(f"{f:.3f}" for f in case.floor_ms)
    for arm, fn in arms.items():
        label = f"{case.name} {arm:8s}"
        if time.time() > deadline:
            emit(f"{label} left out, the time is up", {"name": case.name, "arm": arm, "left_out": True})
            continue
        with reported(case, arm):
            row = measure(fn, case)
            torch.cuda.empty_cache()
            emit(
                f"{label} {row['fwd']:.3f}/{row['fwd_bwd']:.3f} ms  {row['peak_mib']:.0f} MiB"
                f"  host {row['host']:.2f}  floor {floors}",
                {"name": case.name, "arm": arm, "floor": case.floor_ms, **row},
            )


def time_group(index: int, compiled: bool) -> None:
    """Wait for the deadline on standard input, then time one group."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.zeros(1, device="cuda")
    deadline = float(sys.stdin.readline())
    for case in GROUPS[index].timed():
        time_case(case, compiled, deadline)


class Lab:
    """The parent never touches the GPU: checks and compilation in one process per group, then the times in others."""

    def __init__(self, out: Path, budget: float, compiled: bool) -> None:
        self.out, self.budget, self.compiled = out, budget, compiled
        self.rows: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        """One line with the time since the start."""
        print(f"[{time.time() - START:5.1f}] {text}", flush=True)

    def keep(self, row: dict[str, Any]) -> None:
        """One result, written at once."""
        self.rows.append(row)
        (self.out / "ops_lab.json").write_text(json.dumps(self.rows, indent=1))

    def start(self, mode: str, index: int) -> subprocess.Popen[str]:
        """This script in another process."""
        flags = [] if self.compiled else ["--no-compile"]
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), mode, str(index), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )

    def finish(self, worker: subprocess.Popen[str], index: int, line: str, seconds: float) -> None:
        """What a worker says until it ends or its seconds are over."""
        try:
            text, trouble = worker.communicate(line, timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            worker.kill()
            text, trouble = worker.communicate()
            trouble += "\nstopped: out of time"
        for found in text.splitlines():
            if found.startswith("@"):
                result = json.loads(found[1:])
                self.note(result["text"])
                self.keep(result["row"])
        if worker.returncode:
            last = [t for t in trouble.strip().splitlines() if t][-1:]
            self.note(f"{GROUPS[index].name}: ended early: {''.join(last)[:200]}")
            self.keep({"name": GROUPS[index].name, "error": trouble[-3000:]})

    def everything(self, chosen: list[int]) -> None:
        """All checks at once, then the times of one group after another; what failed before is compiled then."""
        until = time.time() + 0.5 * self.budget
        running = {k: self.start("--prepare", k) for k in chosen}
        for k, worker in running.items():
            self.finish(worker, k, "", until - time.time())
        self.note("prepared")
        deadline = START + self.budget
        waiting = {k: self.start("--time", k) for k in chosen}
        for k, worker in waiting.items():
            self.finish(worker, k, f"{deadline}\n", deadline + 10 - time.time())
        self.note("done")


def main() -> None:
    """Parent or, with --prepare, one of its children."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--budget", type=float, default=85.0, help="seconds after which nothing is begun")
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the definition out")
    parser.add_argument("--prepare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--time", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    compiled = not options.no_compile
    if options.prepare is not None:
        prepare(options.prepare, compiled)
    elif options.time is not None:
        time_group(options.time, compiled)
    else:
        chosen = [k for k, group in enumerate(GROUPS) if options.only in group.name]
        Lab(Path(options.out), options.budget, compiled).everything(chosen)


if __name__ == "__main__":
    main()
