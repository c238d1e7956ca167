"""GPU laboratory for the attention kernels: time many configurations, check against fp64, choose a plan.

    python bench/attention_lab.py [--out DIR] [--budget SECONDS] [--shapes tri768,tri384,tri1024,diff384,diff768]

Prints predictions first, then a compact table, and writes attention_lab.json. Kernels are compiled beforehand by
several processes into Triton's disk cache. The whole operator runs with two plans of the fastest tiles: dbias by a
kernel of its own, and by planes that the kernel of dq writes. A tile that fails is reported and left out.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.attention import attention, attention_backward, attention_with_lse, launch, reference
from optimized.ops.tuning import Config, forget

DEVICE = "cuda"
SHAPES = {
    "tri384": (384, 4, 384, 32),
    "tri450": (450, 4, 450, 32),
    "tri768": (768, 4, 768, 32),
    "tri1024": (1024, 4, 1024, 32),
    "tri2048": (2048, 4, 2048, 32),
    "diff384": (48, 16, 384, 48),
    "diff768": (48, 16, 768, 48),
}
GOALS_MS = {
    "tri384": (0.13, 0.55), "tri768": (0.85, 3.4), "tri1024": (1.9, 7.5), "tri2048": (15, 60),
    "diff384": (0.16, 0.70), "diff768": (0.35, 1.5),
}  # fmt: skip

GOALS_MIB = {"tri384": 185, "tri768": 740, "tri1024": 1300, "tri2048": 5200}


def predictions() -> list[str]:
    """What the counted resources say, before anything is measured (132 cores, 1.75 GHz, 5.5 TB/s from L2)."""
    lines = []
    for name in ("tri384", "tri768", "tri1024"):
        r, h, n, _ = SHAPES[name]
        scores = r * h * n * n
        exp_ms = scores / (132 * 16 * 1.75e9) * 1e3
        l2 = lambda per_score, s=scores: per_score * s / 5.5e12 * 1e3  # noqa: E731
        lines.append(
            f"{name}: exp {exp_ms:.2f} ms a pass; fwd L2: 1 row 64 q {l2(4):.2f}, 1x128 {l2(3):.2f}, 2x64 {l2(3):.2f}, "
            f"2x128 {l2(2):.2f}, 4x64 {l2(2.5):.2f}, 4x128 {l2(1.5):.2f} ms; expect fwd near "
            f"{max(1.6 * exp_ms, 1.25 * l2(2)):.2f}, bwd 7 products {3.2 * exp_ms + l2(4):.2f}, 9 products {4.2 * exp_ms + l2(3):.2f}"
        )
    lines.append(
        "expect at 768 by instructions a score against those timed before: forward 1.05 (9.1), grad_kv 1.3 to 1.45 (12.7, was "
        "15.3 at 1.55 to 1.74), dq with planes of 2 rows 1.35 (13.0, was 11.2 at 1.16) and its folds 0.45, of 3 rows 1.7 and 0.3"
    )
    return lines


def config(warps: int, stages: int, cap: int, ahead: int = 0, **constants: int) -> Config:
    """Shorthand; STAGES is the pipelining of the kernel's loop, AHEAD what is done a step early (`forward`)."""
    early = {"AHEAD": ahead} if ahead else {}
    return Config({**constants, "STAGES": stages, **early}, warps, 2, cap)


KERNELS = ("forward", "grad_kv", "grad_bias", "grad_q", "planes")
"""What is timed: `grad_q` is dq alone, `planes` dq with dbias, its folds included."""


def candidates(head_dim: int) -> dict[str, list[Config]]:
    """Configurations by kernel for a head size: the fastest of some 200 timed before, and what the counts favour."""

    def rows(table: list[tuple[int, ...]]) -> list[Config]:
        """ROWS, BQ, BK, warps, STAGES, limit on registers, and AHEAD where it is not 0."""
        return [config(w, s, cap, *early, ROWS=r, BQ=q, BK=k) for r, q, k, w, s, cap, *early in table]

    def tiles(table: list[tuple[int, ...]]) -> list[Config]:
        """BQ, BK, warps, STAGES, limit on registers."""
        return [config(w, s, cap, BQ=q, BK=k) for q, k, w, s, cap in table]

    if head_dim > 32:
        return {
            "forward": rows([(1, 64, 32, 4, 3, 0), (2, 64, 32, 4, 3, 0, 1)]),
            "grad_kv": rows([(1, 32, 64, 4, 3, 168), (1, 64, 64, 4, 3, 0)]),
            "grad_bias": tiles([(64, 64, 4, 3, 0), (64, 64, 4, 3, 168)]),
            "grad_q": rows([(1, 64, 32, 4, 3, 0)]),
            "planes": rows([(2, 64, 32, 4, 3, 0), (2, 64, 32, 4, 4, 0), (3, 64, 16, 4, 3, 0), (1, 64, 64, 4, 3, 0)]),
        }  # fmt: skip
    return {
        "forward": rows([
            (2, 64, 32, 4, 3, 128), (2, 64, 32, 4, 3, 128, 1), (2, 64, 32, 4, 4, 128, 1), (2, 64, 64, 4, 3, 168),
        ]),
        "grad_kv": rows([
            (1, 32, 64, 4, 3, 128), (1, 64, 64, 4, 3, 168), (1, 64, 64, 4, 4, 168), (2, 32, 64, 4, 3, 168),
        ]),
        "grad_bias": tiles([(64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (64, 64, 4, 3, 0)]),
        "grad_q": rows([(2, 64, 32, 4, 3, 128), (3, 64, 32, 4, 3, 0), (1, 64, 64, 4, 3, 168)]),
        "planes": rows([
            (2, 64, 32, 4, 3, 168), (3, 64, 32, 4, 3, 0), (3, 64, 32, 4, 4, 0), (4, 64, 32, 4, 3, 0), (2, 64, 64, 4, 3, 0),
        ]),
    }  # fmt: skip


@dataclass
class Problem:
    """Inputs of one shape in projection layout [row, token, head, d], and the outputs the backward needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    bias: Tensor
    mask: Tensor

    @staticmethod
    def make(
        shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> "Problem":
        """Random normal inputs, about 10 % of keys masked."""
        r, h, n, d = shape
        g = torch.Generator(DEVICE).manual_seed(seed)
        new = lambda *s: torch.randn(s, generator=g, device=DEVICE).to(dtype)  # noqa: E731
        q, k, v, do = (new(1, r, n, h, d).transpose(2, 3) for _ in range(4))
        mask = torch.rand((1, r, n), generator=g, device=DEVICE) > 0.1
        return Problem(q, k, v, do, new(1, 1, h, n, n), mask)

    def call(self) -> launch.Call:
        """Kernel form."""
        return launch.make_call(
            self.q, self.k, self.v, self.bias, self.mask, self.q.shape[-1] ** -0.5, "ieee", True
        )


class Bench:
    """One problem, prepared so that each kernel can run alone."""

    def __init__(self, p: Problem) -> None:
        self.p, self.call = p, p.call()
        self.o = torch.empty_like(p.q)
        self.lse = torch.empty((2, *p.q.shape[:-1]), dtype=torch.float32, device=DEVICE)
        launch.launch_forward(self.call, self.o, self.lse, config(4, 2, 0, ROWS=1, BQ=64, BK=64))
        self.lse2, self.delta = launch.launch_statistics(self.call, self.o, p.do, self.lse[0], None)
        self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (p.q, p.k, p.v))
        self.dbias = torch.empty_like(p.bias)

    def runner(self, kernel: str, c: Config) -> Callable[[], None]:
        """A closure that runs one kernel with one configuration."""
        p, call = self.p, self.call
        if kernel == "forward":
            return lambda: launch.launch_forward(call, self.o, self.lse, c)
        if kernel == "grad_kv":
            turned = launch.turned(call)
            return lambda: launch.launch_grad_kv(turned, p.do, self.lse2, self.delta, self.dk, self.dv, c)
        if kernel == "grad_q":
            return lambda: launch.launch_grad_q(call, p.do, self.lse2, self.delta, self.dq, c)
        if kernel == "planes":
            return lambda: launch.launch_grad_q(call, p.do, self.lse2, self.delta, self.dq, c, self.dbias)
        return lambda: launch.launch_grad_bias(call, p.do, self.lse2, self.delta, self.dbias, c)

    def outputs(self, kernel: str) -> list[Tensor]:
        """What the kernel writes."""
        return {
            "forward": [self.o], "grad_kv": [self.dk, self.dv], "grad_q": [self.dq], "grad_bias": [self.dbias],
            "planes": [self.dq, self.dbias],
        }[kernel]  # fmt: skip


def label(c: Config) -> str:
    """Short name of a configuration."""
    k = c.constants
    return f"{k.get('ROWS', '-')}x{k['BQ']}x{k['BK']} w{c.num_warps} s{k['STAGES']} r{c.max_registers or '-'} a{k.get('AHEAD', 0)}"


def compile_share(args: tuple[int, int, list[tuple[int, int, int, int]]]) -> int:
    """Compile every `count`-th case by running it on a tiny problem; failures are found again, and reported, later."""
    index, count, shapes = args
    done = 0
    for shape in shapes:
        _, h, _, d = shape
        bench = Bench(Problem.make((8, h, 256, d)))
        jobs = [(kernel, c) for kernel, cs in candidates(d).items() for c in cs]
        for kernel, c in jobs[index::count]:
            try:
                bench.runner(kernel, c)()
                done += 1
            except Exception as error:  # reported by the measuring process
                print(f"compile {kernel} {label(c)}: {type(error).__name__}", file=sys.stderr)
    return done


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b, in fp64."""
    return float(((a.detach().double() - b).norm() / b.norm()).item())


def oracle(p: Problem) -> list[Tensor]:
    """fp64 [o, dq, dk, dv, dbias] by autograd through the definition."""
    leaves = [x.double().requires_grad_() for x in (p.q, p.k, p.v, p.bias)]
    o, _ = reference.attention_with_lse(*leaves, p.mask)
    return [o.detach(), *torch.autograd.grad(o, leaves, p.do.double())]


def check_variants(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Worst relative error of each configuration on a small problem of the same head size; nan or 9 when it fails."""
    _, h, _, d = shape
    p = Problem.make((16, h, 200, d), seed=3)
    exact = dict(zip(("o", "dq", "dk", "dv", "dbias"), oracle(p), strict=True))
    names = {
        "forward": ["o"],
        "grad_kv": ["dk", "dv"],
        "grad_q": ["dq"],
        "grad_bias": ["dbias"],
        "planes": ["dq", "dbias"],
    }
    bench = Bench(p)
    errors = {}
    for kernel, cs in candidates(d).items():
        for c in cs:
            for out in bench.outputs(kernel):
                out.fill_(float("nan"))
            try:
                bench.runner(kernel, c)()
                pairs = zip(bench.outputs(kernel), names[kernel], strict=True)
                errors[f"{kernel} {label(c)}"] = max(relative(out, exact[n]) for out, n in pairs)
            except Exception as error:  # out of shared memory or registers: an outcome of the experiment
                errors[f"{kernel} {label(c)}"] = 9.0
                print(f"  {kernel} {label(c)}: {type(error).__name__} {str(error)[:80]}")
        bench.runner("forward", config(4, 2, 0, ROWS=1, BQ=64, BK=64))()
    return errors


def time_variants(shape: tuple[int, int, int, int], errors: dict[str, float], rep: int) -> dict[str, float]:
    """Median ms of every configuration that was right."""
    bench = Bench(Problem.make(shape))
    times = {}
    for kernel, cs in candidates(shape[3]).items():
        for c in cs:
            name = f"{kernel} {label(c)}"
            if errors.get(name, 9.0) < 0.02:
                try:
                    times[name] = float(
                        do_bench(bench.runner(kernel, c), warmup=5, rep=rep, return_mode="median")
                    )
                except Exception as error:  # out of memory: an outcome of the experiment
                    print(f"  {name}: {type(error).__name__} {str(error)[:80]}")
    return times


def best_plans(times: dict[str, float], head_dim: int) -> dict[str, launch.Plan]:
    """The fastest configuration of each kernel, as two plans; one is left out if none of its tiles worked."""
    best = {}
    for kernel, cs in candidates(head_dim).items():
        ranked = [
            (times[f"{kernel} {label(c)}"], i) for i, c in enumerate(cs) if f"{kernel} {label(c)}" in times
        ]
        if ranked:
            best[kernel] = cs[min(ranked)[1]]
    found = {}
    for way, bias, q in (("kernel", "grad_bias", "grad_q"), ("planes", None, "planes")):
        if {"forward", "grad_kv", q, bias or q} <= best.keys():
            found[way] = launch.Plan(best["forward"], best["grad_kv"], best[bias] if bias else None, best[q])
    return found


def fixed_costs(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """ms of the launches that have no configuration: preparation for one and for both passes, statistics."""
    p = Problem.make(shape)
    bench = Bench(p)
    args = (p.q, p.k, p.v, p.bias, p.mask, p.q.shape[-1] ** -0.5, "ieee")
    jobs = {
        "prepare": lambda: launch.make_call(*args, False),
        "prepare both": lambda: launch.make_call(*args, True),
        "statistics": lambda: launch.launch_statistics(bench.call, bench.o, p.do, bench.lse[0], None),
    }
    return {name: float(do_bench(job, warmup=5, rep=20, return_mode="median")) for name, job in jobs.items()}


def use(plan: launch.Plan) -> None:
    """Let the operator take this plan from here on."""
    launch.plan_for = lambda q, precision: plan
    forget()


def whole(name: str, plan: launch.Plan, rep: int) -> dict[str, float | bool]:
    """Forward and forward+backward of the public operator with a plan: ms, peak MiB, repeatability."""
    p = Problem.make(SHAPES[name])
    use(plan)
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v, p.bias)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*leaves, p.mask), leaves, p.do)

    with torch.no_grad():
        forward = do_bench(
            lambda: attention(p.q, p.k, p.v, p.bias, p.mask), warmup=10, rep=rep, return_mode="median"
        )
        saved = attention_with_lse(p.q, p.k, p.v, p.bias, p.mask)
        again = partial(attention_backward, p.do, p.q, p.k, p.v, p.bias, p.mask, *saved)
        alone = do_bench(again, warmup=10, rep=rep, return_mode="median")
        del saved, again
    total = do_bench(both, warmup=10, rep=rep, return_mode="median")
    host = time.perf_counter()
    for _ in range(5):
        both()
    host = (time.perf_counter() - host) / 5 * 1e3
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    same = all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, both(), strict=True))
    return {
        "fwd_ms": float(forward),
        "bwd_ms": float(alone),
        "fwdbwd_ms": float(total),
        "host_ms": host,
        "peak_mib": peak,
        "bitwise": same,
    }


def accuracy(name: str, plan: launch.Plan, dtype: torch.dtype, rows: int = 24) -> dict[str, list[float]]:
    """Relative errors of [o, dq, dk, dv, dbias] against fp64: ours and the eager definition in the same dtype."""
    _, h, n, d = SHAPES[name]
    p = Problem.make((rows, h, n, d), dtype, seed=5)
    p.mask[:, 0] = False
    exact = oracle(p)
    use(plan)
    found = {}
    for who, f in (("ours", attention), ("eager", reference.attention)):
        leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v, p.bias)]
        o = f(*leaves, p.mask)
        found[who] = [
            relative(a, b) for a, b in zip((o, *torch.autograd.grad(o, leaves, p.do)), exact, strict=True)
        ]
    return found


def by_kernel(name: str, plan: launch.Plan) -> dict[str, float]:
    """Milliseconds in each kernel of one forward and backward pass, as PyTorch's profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    p = Problem.make(SHAPES[name])
    use(plan)
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v, p.bias)]
    torch.autograd.grad(attention(*leaves, p.mask), leaves, p.do)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        torch.autograd.grad(attention(*leaves, p.mask), leaves, p.do)
        torch.cuda.synchronize()
    return {row.key: row.device_time_total / 1e3 for row in seen.key_averages() if row.device_time_total}


def flex_ms(name: str) -> list[float]:
    """FlexAttention, compiled, forward and forward+backward ms."""
    from torch.nn.attention.flex_attention import flex_attention

    p = Problem.make(SHAPES[name])
    q, k, v, do = (x[0].contiguous() for x in (p.q, p.k, p.v, p.do))
    bias, keep = p.bias[0, 0].clone().requires_grad_(), p.mask[0]

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(keep[b, j], s + bias[h, i, j], -math.inf)

    flex = torch.compile(flex_attention, dynamic=False)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    forward = do_bench(lambda: flex(*leaves, score_mod=score), return_mode="median", rep=50)
    both = do_bench(
        lambda: torch.autograd.grad(flex(*leaves, score_mod=score), [*leaves, bias], do),
        return_mode="median",
        rep=50,
    )
    return [float(forward), float(both)]


def probes(rep: int) -> dict[str, float]:
    """Where the time goes at 768: streams of known size."""
    x = torch.empty(2**28, dtype=torch.bfloat16, device=DEVICE).normal_()
    y = torch.empty_like(x)
    copy = do_bench(lambda: y.copy_(x), rep=rep, return_mode="median")
    return {"copy_TBps": 4 * x.numel() / copy / 1e9}


def main() -> None:
    """Run everything within the budget; later parts are dropped, and said to be, when time runs out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--budget", type=float, default=85)
    parser.add_argument("--shapes", default="tri768,tri384,tri1024,diff384,diff768")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too, at 768 tokens")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    begun = time.time()
    left = lambda: args.budget - (time.time() - begun)  # noqa: E731
    found: dict[str, object] = {
        "predictions": predictions(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print("PREDICTIONS\n" + "\n".join(predictions()))
    names = args.shapes.split(",")
    sizes = sorted({SHAPES[n][3] for n in names})
    shapes = [next(SHAPES[n] for n in names if SHAPES[n][3] == d) for d in sizes]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers) as pool:
        done = pool.map(compile_share, [(i, args.workers, shapes) for i in range(args.workers)])
    print(f"compiled {sum(done)} configurations in {time.time() - begun:.0f} s")
    found["device"] = torch.cuda.get_device_name()
    found["probes"] = probes(20)
    table: dict[str, dict[str, float]] = {}
    errors = {d: check_variants(s) for d, s in zip(sizes, shapes, strict=True)}
    found["errors"] = {str(d): e for d, e in errors.items()}
    plans: dict[str, dict[str, launch.Plan]] = {}
    for name in names:
        if left() < 25:
            print(f"{name}: dropped, no time left")
            continue
        d = SHAPES[name][3]
        table[name] = time_variants(SHAPES[name], errors[d], 20)
        plans[name] = best_plans(table[name], d)
        fixed = fixed_costs(SHAPES[name])
        print(f"== {name}: " + "; ".join(f"{k} {v:.3f}" for k, v in fixed.items()))
        for kernel in KERNELS:
            mine = {k: v for k, v in table[name].items() if k.split()[0] == kernel}
            ranked = sorted(mine, key=lambda k: mine[k])[:7]
            print(f" {kernel}: " + "; ".join(f"{k.removeprefix(kernel + ' ')} {mine[k]:.3f}" for k in ranked))
        table[name] |= fixed
        Path(args.out, "attention_lab.json").write_text(json.dumps({**found, "times_ms": table}, indent=1))
    results: dict[str, object] = {}
    for name in plans:
        for way, plan in plans[name].items():
            if left() < 8:
                print(f"{name} {way}: whole operator dropped")
                continue
            try:
                line = whole(name, plan, 30)
            except Exception as error:  # out of memory: an outcome of the experiment
                print(f"{name} {way}: {type(error).__name__} {str(error)[:80]}")
                continue
            results[f"{name} {way}"] = line
            goal = GOALS_MS.get(name, (math.nan, math.nan))
            print(
                f"{name} dbias by {way}: fwd {line['fwd_ms']:.3f} (goal {goal[0]})  bwd {line['bwd_ms']:.3f}  "
                f"fwd+bwd {line['fwdbwd_ms']:.3f} (goal {goal[1]})  peak {line['peak_mib']:.0f} MiB (goal "
                f"{GOALS_MIB.get(name, math.nan)})  host {line['host_ms']:.2f} ms  bitwise {line['bitwise']}"
            )
    for name in ("tri768", "diff768"):
        if left() < 8 or "planes" not in plans.get(name, {}):
            continue
        try:
            spent = by_kernel(name, plans[name]["planes"])
        except Exception as error:  # a profiler that is not allowed to look
            print(f"{name} by kernel: {type(error).__name__} {str(error)[:80]}")
            continue
        results[f"{name} by kernel"] = spent
        print(f"{name} by kernel: " + "; ".join(f"{k} {v:.3f}" for k, v in spent.items()))
    for name in ("tri384", "diff384"):
        for way, plan in plans.get(name, {}).items():
            if left() > 8:
                errs = accuracy(name, plan, torch.bfloat16)
                results[f"{name} {way} errors"] = errs
                print(
                    f"{name} dbias by {way}: error ours/eager "
                    + " ".join(f"{a:.2e}/{b:.2e}" for a, b in zip(errs["ours"], errs["eager"], strict=True))
                )
    for dtype in (torch.float16, torch.float32):
        if left() > 12:
            plan = launch.default_plan(dtype, 32, "sm_90")
            errs = accuracy("tri384", plan, dtype, 8)
            results[f"tri384 {dtype} errors"] = errs
            print(
                f"{dtype} error ours/eager: "
                + " ".join(f"{a:.2e}/{b:.2e}" for a, b in zip(errs["ours"], errs["eager"], strict=True))
            )
    if args.flex and left() > 25:
        results["flex tri768"] = flex_ms("tri768")
        print(f"flex tri768: {results['flex tri768']}")
    found |= {"times_ms": table, "whole": results}
    Path(args.out, "attention_lab.json").write_text(json.dumps(found, indent=1))
    print(f"total {time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
