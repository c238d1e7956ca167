"""One GPU call for triangle multiplication: its kernels with some tiles, errors, whole operators.

python bench/triangle_lab.py --out DIR                          (under two minutes on one H200)
python bench/triangle_lab.py --ship DIR/triangle_lab.json       puts the fastest tiles into the package

Processes compile everything beforehand without launching a kernel. One worker measures; a candidate that kills it is
reported and left out, and a new worker takes up behind it. The error of a candidate is that of the whole operator with
it, over the definition's, both against fp64; of the forward kernels for inputs whose mean is three deviations.

In bfloat16 the output side has two forms: of raw rows with statistics that are kept for the backward pass, which an H200
runs, and the one that takes everything itself. Both are timed, kernel by kernel and whole.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fused_lab
import torch
from fused_lab import BF, EPS, C, both_passes, functions, parameters, whole
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from optimized.ops import tuning
from optimized.ops.launching import checked, tile
from optimized.ops.triangle_multiplication import TriangleWeights, hopper_launch
from optimized.ops.triangle_multiplication import launch as tm
from optimized.ops.tuning import Config

FAMILY = "triangle_multiplication"
LENGTHS = (384, 768)
LIMIT = 118.0
START = time.time()
# BM, BN, warps, depth of the pipeline, and a limit on registers: the shipped tile first.
TILES: dict[str, list[tuple[int, ...]]] = {
    "project_folded": [
        (64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 128, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2),
    ],
    "output_folded": [(64, 128, 8, 3), (32, 128, 8, 2, 128), (32, 128, 4, 2), (64, 64, 4, 3)],
    "output_backward_folded": [(64, 128, 8, 3), (32, 128, 8, 2, 128), (32, 128, 4, 2), (64, 128, 8, 2)],
    "output_weight_folded": [(64, 64, 4, 3), (64, 64, 4, 4)],
    "gate_gradient": [()],
    "moments": [()],
    "output": [(64, 128, 4, 1)],
    "output_backward": [(64, 128, 4, 1), (64, 32, 4, 1)],
    "output_weight": [(64, 64, 4, 3)],
    "input_gradient": [(64, 64, 4, 2)],
    "input_gradient_kept": [
        (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2),
    ],
    "project_weight": [(64, 64, 4, 3), (64, 64, 4, 4)],
    # On Hopper: forward, where they take their statistics themselves, and backward. Of the output side, stages and warps.
    "project_hopper": [()],
    "output_hopper": [(4, 8), (3, 8)],
    "project_given_hopper": [()],
    "input_gradient_hopper": [()],
    # Channels at a time, positions and warps.
    "z_statistics": [(32, 32, 4), (32, 64, 4), (32, 64, 8), (64, 32, 4), (128, 32, 4)],
    "x_statistics": [(16, 64, 2), (16, 128, 4), (8, 64, 2), (16, 64, 4), (32, 64, 2)],
}  # fmt: skip
# What stands for the same tile with statistics kept, and what has no tile that is looked up.
KEPT = {"input_gradient_kept": "input_gradient"}
HOPPER = ("project_hopper", "output_hopper", "project_given_hopper", "input_gradient_hopper")
FIXED = ("gate_gradient", "moments", "z_statistics", "x_statistics", *HOPPER)
# Run only where no statistics are kept.
PLAIN = ("output", "output_backward", "output_weight", "input_gradient")
# GEMM units of 2·N²·c·c FLOP and passes over N²·c bf16 values.
WORK = {
    "z_statistics": (0, 1),
    "project_folded": (4, 3),
    "project_hopper": (4, 3),
    "project_given_hopper": (4, 3),
    "output_hopper": (2, 3),
    "input_gradient_hopper": (9, 6),
    "x_statistics": (0, 1),
    "output_folded": (2, 3),
    "output": (2, 3),
    "output_backward": (4, 9),
    "output_weight": (2, 4),
    "output_backward_folded": (3, 6),
    "moments": (0, 0.25),
    "output_weight_folded": (2, 4),
    "gate_gradient": (1, 2),
    "input_gradient": (8, 6),
    "input_gradient_kept": (8, 6),
    "project_weight": (8, 3),
}
Job = tuple[str, tuple[int, ...]]
JOBS: list[Job] = [(kernel, t) for kernel, ts in TILES.items() for t in ts]


def config_of(job: Job) -> Config:
    """The configuration of a candidate; ValueError where it breaks the rule of `checked`."""
    kernel, shape = job
    if kernel in FIXED:
        if kernel == "output_hopper":
            return Config({"STAGES": shape[0]}, shape[1])
        names = ("CHANNELS", "BLOCK")
        return Config(dict(zip(names, shape, strict=False)), shape[-1]) if shape else tile(64, 64, 4, 1)
    config = tile(*shape)
    if kernel == "project_weight":
        config = Config(config.constants | {"TURNED": 1}, config.num_warps)
    return checked(config, f"{FAMILY}.{kernel}")


def entries_of(job: Job) -> dict[str, Config]:
    """The tuning entry that makes whole operators launch a candidate; none where nothing is looked up."""
    if job[0] in FIXED:
        return {}
    return {f"{FAMILY}.{KEPT.get(job[0], job[0])}/bfloat16/{C}": config_of(job)}


@contextmanager
def statistics(kept: bool, hopper: bool = True) -> Iterator[None]:
    """Whole operators keep statistics or keep none; without `hopper` their forward pass is Triton's on Hopper too."""
    before = tm.folds_output, tm.overlaps
    tm.folds_output = lambda z, hidden, dtype: kept
    if not hopper:
        tm.overlaps = lambda z, hidden, dtype: False
    try:
        yield
    finally:
        tm.folds_output, tm.overlaps = before


class Bench:
    """Inputs of one length and a closure per candidate."""

    def __init__(self, n: int) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").to(BF)

        w = TriangleWeights(*parameters("tm"))
        self.z, self.dy, self.dn = normal(n, n, C), normal(n, n, C), normal(n, n, C)
        self.shape = tm.Shape.of(self.z, C)
        area = self.shape.padded**2
        self.grad = normal(2 * C, self.shape.padded, self.shape.padded)
        self.n = normal(area * C)
        self.norm = (w.norm_in_weight, w.norm_in_bias)
        self.norms = (w.norm_out_weight, w.norm_out_bias, *self.norm)
        self.folded, self.packed = tm.fold_weights(w, BF)
        self.pairs = tuple((normal(n * n, C), normal(n * n, C)) for _ in range(2))
        self.square = normal(C, self.shape.padded, self.shape.padded)
        self.spare = torch.empty(3, self.shape.padded, self.shape.padded, device="cuda")
        self.stats = torch.rand(5, self.shape.padded, self.shape.padded, device="cuda") + 0.5
        self.moments = tm.moments_of(self.stats, self.shape, BF)

    def call(self, job: Job) -> Callable[[], object]:
        """The launch of one candidate."""
        config, s, z, w = config_of(job), self.shape, self.z, self.packed
        x = self.grad[:C]
        inner = (z, self.norm, w, None, self.grad, self.dn, self.n, s, EPS, config)
        outer = (x, z, self.norms, w, self.dy, s, EPS, config)
        raw = (x, z, self.stats, self.moments, self.folded, self.dy, s, config)
        projected = (z, self.stats[4], self.moments[4:], self.folded, s)
        sums = (self.square, self.grad[C:], x, z, self.moments, self.norms, w, s, config)
        calls: dict[str, Callable[[], object]] = {
            "z_statistics": lambda: tm.z_statistics(
                z, None, s, EPS, self.stats[2:], self.moments[4:], config
            ),
            "project_hopper": lambda: hopper_launch.project(z, None, self.spare, self.folded, s, EPS),
            "project_given_hopper": lambda: hopper_launch.project(
                z, None, self.stats[2:], self.folded, s, EPS, given=True
            ),
            "output_hopper": lambda: hopper_launch.output(x, z, self.stats, self.folded, s, EPS, config),
            "input_gradient_hopper": lambda: hopper_launch.input_gradient(
                z, self.norm, w, None, self.grad, self.square, self.n, s, self.stats
            ),
            "x_statistics": lambda: tm.x_statistics(x, s, EPS, self.stats[:2], self.moments[:4], config),
            "moments": lambda: tm.moments_of(self.stats, s, BF),
            "project_folded": lambda: tm.project_folded(*projected, config),
            "output": lambda: tm.output_forward(x, z, self.norms, w, s, EPS, config),
            "output_folded": lambda: tm.output_folded(x, z, self.stats, self.moments, self.folded, s, config),
            "output_backward_folded": lambda: tm.output_backward_folded(*raw),
            "output_weight_folded": lambda: tm.output_weight_folded(*sums),
            "gate_gradient": lambda: tm.gate_gradient(self.square, w, s),
            "input_gradient": lambda: tm.input_gradient(*inner),
            "input_gradient_kept": lambda: tm.input_gradient(*inner, stats=self.stats),
            "output_backward": lambda: tm.output_backward(*outer),
            "output_weight": lambda: tm.output_weight_gradient(self.pairs, s, config),
            "project_weight": lambda: tm.project_weight_gradient(self.n, self.grad, w, s, config),
        }
        return calls[job[0]]


class Accuracy:
    """Errors of the whole operator with one candidate in it, at a length of whole tiles and at one with a rest."""

    def __init__(self) -> None:
        self.problems = []
        for n, mean in ((128, 0.3), (101, 3.0)):
            normal = fused_lab.random(3)
            z, grad = (normal(n, n, C) + mean).to(BF), normal(n, n, C).to(BF)
            mask = normal(n, n) > -0.8
            ours, reference = functions("tm", n == 128, mask)
            tensors = [z, *parameters("tm")]
            exact = self._passes(reference, tensors, grad, torch.float64)
            eager = self._passes(reference, tensors, grad, None)
            bound = [self._distance(e, x) for e, x in zip(eager, exact, strict=True)]
            self.problems.append((ours, tensors, grad, exact, bound))

    @staticmethod
    def _passes(fn: Any, tensors: list[Tensor], grad: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        return both_passes(fn, [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors], [grad])

    @staticmethod
    def _distance(a: Tensor, b: Tensor) -> float:
        return ((a.double() - b).norm() / b.norm()).item()

    def ratios(self, job: Job | None, kept: bool = True) -> list[float]:
        """The worst result's error over the definition's, per problem; `job` None: with the shipped tiles."""
        entries = {} if job is None else entries_of(job)
        found = []
        forward = job is not None and job[0] in ("project_folded", "output_folded")
        with statistics(kept, not forward), tuning.trying(entries):
            for ours, tensors, grad, exact, bound in self.problems:
                values = self._passes(ours, tensors, grad, None)
                own = [self._distance(a, x) for a, x in zip(values, exact, strict=True)]
                found.append(max(o / b for o, b in zip(own, bound, strict=True)))
        return found


def measured(first: int) -> Iterator[dict[str, Any]]:
    """The whole operator (when `first` is 0), then every candidate from `first` on."""
    torch.backends.cuda.matmul.allow_tf32 = False
    accuracy = Accuracy()
    for kept in (True, False) if first == 0 else ():
        name = f"{'with' if kept else 'without'} statistics"
        ratios = accuracy.ratios(None, kept)
        yield {"whole": name, "ratios": ratios, "repeats": ratios == accuracy.ratios(None, kept)}
        for n in (384, 450, 768, 900, 1024, 2048):
            with statistics(kept), tuning.trying({}):
                yield {"whole": name, **whole("tm", n)}
            torch.cuda.empty_cache()
    benches = {n: Bench(n) for n in LENGTHS}
    for index, job in enumerate(JOBS[first:], first):
        yield {"begin": index}
        row: dict[str, Any] = {"kernel": job[0], "tile": list(job[1])}
        try:
            row["ms"] = {
                n: do_bench(b.call(job), warmup=8, rep=30, return_mode="median") for n, b in benches.items()
            }
            row["ratios"] = accuracy.ratios(job, job[0] not in PLAIN)
        except (OutOfResources, ValueError) as error:
            row["refused"] = str(error)
        yield row


def compile_share(index: int, count: int) -> None:
    """Compile every `count`-th candidate from `index` on: the host's code runs, no kernel of ours is launched."""
    launch = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = only_compile
    accuracy, bench = Accuracy(), Bench(128)
    runs: list[Callable[[], object]] = [lambda: accuracy.ratios(None), lambda: accuracy.ratios(None, False)]
    runs += [lambda n=n: whole("tm", n, measure=False) for n in (128, 66)]
    for job in JOBS:
        runs.append(lambda job=job: bench.call(job)())
        runs.append(lambda job=job: accuracy.ratios(job, job[0] not in PLAIN))
    for run in runs[index::count]:
        try:
            run()
        except Exception as error:  # the worker that needs this kernel says more
            print(f"{type(error).__name__} {error}"[:160], flush=True)


def note(text: str) -> None:
    """One line with the time since the start."""
    print(f"[{time.time() - START:5.1f}] {text}", flush=True)


def started(*arguments: str) -> subprocess.Popen[str]:
    """This script in another process."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """What a process printed, until it ends or its time does."""
    left = max(1.0, min(seconds, LIMIT - (time.time() - START)))
    try:
        return process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        process.kill()
        text, trouble = process.communicate()
        return text, trouble + "\nstopped: out of time"


def everything(out: Path) -> None:
    """Compile, measure, and print what is fastest."""
    count = max(1, (os.cpu_count() or 4) - 2)
    shares = [started("--share", str(k), str(count)) for k in range(count)]
    for share in shares:
        text, trouble = output_of(share, 45.0)
        if text or share.returncode:
            note(f"compiling: {text.strip()[:300]} {trouble.strip()[-200:]}")
    note(f"compiled with {count} processes")
    rows: list[dict[str, Any]] = []
    first = 0
    while first < len(JOBS) and time.time() - START < LIMIT - 5:
        worker = started("--first", str(first))
        text, trouble = output_of(worker, 60.0)
        begun = first
        for line in text.splitlines():
            if not line.startswith("@"):
                continue
            row = json.loads(line[1:])
            begun = row.get("begin", begun)
            if "begin" not in row:
                rows.append(row)
        out.write_text(json.dumps(rows, indent=1))
        if worker.returncode == 0:
            break
        note(f"died in {JOBS[begun]}: {trouble.strip()[-200:]}")
        first = begun + 1
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Whole operators and errors, then a ranking of the candidates for each thing that is computed."""
    for row in (r for r in rows if "whole" in r):
        if "ratios" in row:
            note(
                f"whole {row['whole']} errors over the definition's {row['ratios']}, repeats {row['repeats']}"
            )
        else:
            note(
                f"whole {row['whole']} N={row['n']:4d} fwd {row['fwd']:.4f} fwd+bwd {row['fwd_bwd']:.4f} ms"
                f"  peak {row['peak_mib']:.0f} MiB  host {row['host']:.2f} ms"
            )
    for row in (r for r in rows if "refused" in r):
        note(f"{row['kernel']} {row['tile']}: {row['refused'][:140]}")
    for kernel, (units, passes) in WORK.items():
        for n in LENGTHS:
            size = 2 * n**2 * C
            floor = max(units * size * C / 790e12, passes * size / 4.27e12) * 1e3
            note(f"{kernel} N={n}: floor {floor:.4f}")
            own = [r for r in rows if r.get("kernel") == kernel and "ms" in r]
            for row in sorted(own, key=lambda r: r["ms"][str(n)]):
                ratios = "  ".join(f"{r:.2f}" for r in row.get("ratios", []))
                note(
                    f"    {row['ms'][str(n)]:.4f} ms {row['kernel']:16s} {tuple(row['tile'])}  errors {ratios}"
                )


def ship(results: Path) -> None:
    """Put the fastest tile of every kernel (shares of the best time at both lengths) into the shipped file."""
    file = tuning.SHIPPED / "nvidia-h200.json"
    entries = tuning.read_configs(file)
    rows = [r for r in json.loads(results.read_text()) if "ms" in r and max(r["ratios"]) < 1.1]
    for kernel in TILES:
        own = [r for r in rows if r["kernel"] == kernel]
        if not own or kernel in FIXED + PLAIN:  # of two forms, the one that is run
            continue
        least = {n: min(r["ms"][n] for r in own) for n in own[0]["ms"]}
        best = min(own, key=lambda r: sum(r["ms"][n] / least[n] for n in least))
        config = config_of((kernel, tuple(best["tile"])))
        only_bf16 = kernel.endswith("_folded") and "project" not in kernel
        for dtype in ("bfloat16",) if only_bf16 else ("bfloat16", "float16"):
            entries[f"{FAMILY}.{KEPT.get(kernel, kernel)}/{dtype}/{C}"] = config
        print(kernel, best["tile"], best["ms"])
    tuning.write_configs(file, entries)


def main() -> None:
    """Parent or worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--share", type=int, nargs=2)
    parser.add_argument("--first", type=int)
    parser.add_argument("--ship", type=Path, help="write the fastest tiles of a triangle_lab.json")
    options = parser.parse_args()
    if options.ship:
        ship(options.ship)
    elif options.share:
        compile_share(*options.share)
    elif options.first is not None:
        for row in measured(options.first):
            print("@" + json.dumps(row), flush=True)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        everything(options.out / "triangle_lab.json")


if __name__ == "__main__":
    main()
