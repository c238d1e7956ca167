"""One GPU call for the fused operators: whole operators first, then errors, then tile shapes; each in its own process.

python bench/fused_lab.py --ship DIR/fused_lab.json      puts the fastest tiles into the package
python bench/fused_lab.py --out DIR      (under 90 s on one H200; a crash costs one group, the rest is reported)

Processes compile everything beforehand without launching a kernel. Then one worker per group measures, one at
a time; a tile that kills its worker is reported and left out, and a new worker takes up behind it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from optimized.ops.launching import checked, tile
from optimized.ops.layer_norm_linear import launch as ln
from optimized.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference
from optimized.ops.parameters import fold, pack
from optimized.ops.transition import launch as tr
from optimized.ops.transition import transition, transition_reference
from optimized.ops.triangle_multiplication import (
    TriangleWeights,
    triangle_multiplication,
    triangle_multiplication_reference,
)
from optimized.ops.triangle_multiplication import launch as tm
from optimized.ops.tuning import Config

C, EPS, BF, FULL = 128, 1e-5, torch.bfloat16, torch.float32
LENGTHS = (384, 450, 768, 1024, 2048)
LIMIT = 88.0
START = time.time()
Fn = Callable[..., Any]

# BM, BN, warps, depth of the pipeline, and optionally a cap on registers per thread. A name ending in "'" is the kernel
# in its other form, which `FORMS` names.
TILES: dict[str, list[tuple[int, ...]]] = {
    "tr.forward": [(64, 64, 4, 2)],
    "tr.forward'": [(64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2, 128), (128, 32, 8, 3, 128)],
    "tr.input_gradient": [(128, 64, 8, 3)],
    "tr.input_gradient'": [(64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 3)],
    "tr.weight_gradient": [(128, 64, 8, 2)],
    "tr.weight_gradient'": [(32, 64, 4, 3), (32, 64, 4, 4), (32, 128, 8, 3)],
    "ln.forward": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (64, 128, 4, 2),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (128, 32, 8, 2),
        (128, 32, 8, 3),
    ],
    "ln.input_gradient": [
        (128, 64, 8, 3, 128),
        (128, 32, 8, 5, 128),
        (64, 64, 4, 4, 128),
        (64, 64, 4, 3, 128),
        (64, 32, 4, 4, 128),
    ],
    "ln.weight_gradient": [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 8, 3)],
}
FORMS = {"tr.forward": "JOINT", "tr.input_gradient": "JOINT", "tr.weight_gradient": "TURNED"}
OPERATORS = {"tr": "transition", "tm": "triangle_multiplication", "ln": "layer_norm_linear"}
# GEMM units of 2·N²·c·c FLOP, and passes over N²·c bf16 values: the floors in the table.
WORK = {
    "tr.forward": (12, 2),
    "tr.input_gradient": (20, 4),
    "tr.weight_gradient": (24, 2),
    "ln.forward": (4, 5),
    "ln.input_gradient": (4, 7),
    "ln.weight_gradient": (4, 5),
}
CHECKS = [
    ("tm", 96, 128, BF, FULL),
    ("tm", 101, 128, BF, BF),
    ("tm", 101, 64, torch.float16, FULL),
    ("tm", 48, 128, FULL, FULL),
    ("tr", 90, 128, BF, FULL),
    ("tr", 101, 64, torch.float16, FULL),
    ("tr", 20, 384, BF, FULL),
    ("tr", 32, 128, FULL, FULL),
    ("ln", 75, 128, BF, FULL),
    ("ln", 75, 64, BF, FULL),
]


def random(seed: int) -> Fn:
    """A source of normal numbers on the GPU."""
    g = torch.Generator("cuda").manual_seed(seed)
    return lambda *shape: torch.randn(*shape, device="cuda", generator=g)


def parameters(op: str, c: int = C, dtype: torch.dtype = FULL) -> list[Tensor]:
    """Weights of one operator in the order its function takes them."""
    normal = random(1)
    values = [1 + 0.2 * normal(c), 0.1 * normal(c)]
    if op == "tr":
        values += [normal(4 * c, c) / c**0.5, normal(4 * c, c) / c**0.5, normal(c, 4 * c) / (4 * c) ** 0.5]
    else:
        values += [normal(c, c) / c**0.5 for _ in range(4)]
    if op == "tm":
        values += [1 + 0.2 * normal(c), 0.1 * normal(c), normal(c, c) / c**0.5, normal(c, c) / c**0.5]
    if op == "ln":
        values.append(normal(4, c) / c**0.5)
    return [v.to(dtype) for v in values]


def functions(op: str, outgoing: bool = True, mask: Tensor | None = None) -> tuple[Fn, Fn]:
    """The operator and its definition, both of the input and the flat list of weights, giving a list."""
    if op == "tr":
        return lambda *t: [transition(*t)], lambda *t: [transition_reference(*t)]
    if op == "ln":
        return (
            lambda x, *p: layer_norm_linear(x, p[0], p[1], list(p[2:6]), p[6]),
            lambda x, *p: layer_norm_linear_reference(x, p[0], p[1], list(p[2:6]), p[6]),
        )
    return (
        lambda z, *w: [triangle_multiplication(z, TriangleWeights(*w), outgoing, mask)],
        lambda z, *w: [triangle_multiplication_reference(z, TriangleWeights(*w), outgoing, mask)],
    )


def output_gradients(op: str, grad: Tensor) -> list[Tensor]:
    """Gradients of the operator's results, made from one."""
    return [grad] * 4 + [grad[..., :4].movedim(2, 0).contiguous()] if op == "ln" else [grad]


def both_passes(fn: Fn, leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results, then the gradients of all leaves."""
    ys = fn(*leaves)
    found = torch.autograd.grad(ys, leaves, [g.to(y.dtype) for g, y in zip(grads, ys, strict=True)])
    return [*(y.detach() for y in ys), *found]


def whole(op: str, n: int, outgoing: bool = True, measure: bool = True) -> dict[str, Any]:
    """Forward, forward and backward, peak memory and host time of one call with default tiles."""
    z, grad = torch.randn(n, n, C, device="cuda").to(BF), torch.randn(n, n, C, device="cuda").to(BF)
    leaves = [t.detach().requires_grad_() for t in (z, *parameters(op))]
    fn, grads = functions(op, outgoing)[0], output_gradients(op, grad)

    def forward() -> None:
        with torch.no_grad():
            fn(*leaves)

    both_passes(fn, leaves, grads)
    if not measure:
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    held = both_passes(fn, leaves, grads)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    del held
    f = do_bench(forward, warmup=10, rep=40, return_mode="median")
    fb = do_bench(lambda: both_passes(fn, leaves, grads), warmup=10, rep=60, return_mode="median")
    host = time.perf_counter()
    for _ in range(20):
        both_passes(fn, leaves, grads)
    host = (time.perf_counter() - host) / 20 * 1e3
    torch.cuda.synchronize()
    return {"op": op, "n": n, "outgoing": outgoing, "fwd": f, "fwd_bwd": fb, "peak_mib": peak, "host": host}


def whole_group(op: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every length of one operator, and the bare contraction beside triangle multiplication."""
    for n in LENGTHS:
        for outgoing in (True, False) if op == "tm" else (True,):
            r = whole(op, n, outgoing)
            name = op + ("" if op != "tm" else " out" if outgoing else " in")
            yield (
                f"{name:7s} N={n:4d} fwd {r['fwd']:8.4f} fwd+bwd {r['fwd_bwd']:8.4f} ms"
                f"  peak {r['peak_mib']:6.0f} MiB  host {r['host']:.2f} ms",
                r,
            )
            torch.cuda.empty_cache()
        if op == "tm" and n <= 1024:
            ab = torch.randn(2 * C, tm.Shape.of(torch.empty(n, 1, C), C).padded, n, device="cuda").to(BF)
            ab = torch.nn.functional.pad(ab, (0, ab.shape[1] - n))
            f = do_bench(lambda ab=ab: tm.contract(ab, True), return_mode="median")
            b = do_bench(lambda ab=ab: tm.contract_backward(ab[:C], ab, True), return_mode="median")
            yield f"  bmm  N={n:4d} fwd {f:8.4f} bwd {b:8.4f} ms", {"bmm": n, "forward": f, "backward": b}


def errors(fn: Fn, ref: Fn, tensors: list[Tensor], grads: list[Tensor]) -> dict[str, Any]:
    """Error against fp64 of every result over the definition's, the worst of them, and repeatability."""

    def evaluate(f: Fn, dtype: torch.dtype | None) -> list[Tensor]:
        return both_passes(f, [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors], grads)

    exact = evaluate(ref, torch.float64)
    ours, again, eager = evaluate(fn, None), evaluate(fn, None), evaluate(ref, None)

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a.double() - b).norm() / b.norm()).item()

    pairs = [(distance(a, d), distance(e, d)) for a, e, d in zip(ours, eager, exact, strict=True)]
    worst = max(range(len(pairs)), key=lambda k: pairs[k][0] / pairs[k][1])
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    return {"pairs": pairs, "worst": worst, "ratio": pairs[worst][0] / pairs[worst][1], "bitwise": same}


def check(op: str, n: int, c: int, dtype: torch.dtype, parameter_dtype: torch.dtype) -> list[dict[str, Any]]:
    """Errors of one operator at one size; both directions, one masked, for triangle multiplication."""
    torch.backends.cuda.matmul.allow_tf32 = False
    normal = random(3)
    z, grad = (normal(n, n, c) * 2 + 0.3).to(dtype), normal(n, n, c).to(dtype)
    tensors, grads = [z, *parameters(op, c, parameter_dtype)], output_gradients(op, grad)
    mask = normal(n, n) > -0.8
    ways = [(True, mask), (False, None)] if op == "tm" else [(True, None)]
    return [errors(*functions(op, outgoing, m), tensors, grads) for outgoing, m in ways]


def check_group() -> Iterator[tuple[str, dict[str, Any]]]:
    """All checks."""
    for case in CHECKS:
        label = " ".join(str(v).removeprefix("torch.") for v in case)
        for r in check(*case):
            ours, eager = r["pairs"][r["worst"]]
            yield (
                f"check {label} result {r['worst']}: {ours:.2e} eager {eager:.2e} ratio {r['ratio']:.2f}"
                f" bitwise {r['bitwise']}",
                {"case": label, **r},
            )


def plain(name: str) -> str:
    """The kernel's name without its form."""
    return name.removesuffix("'")


def config_of(name: str, shape: tuple[int, ...]) -> Config:
    """The configuration of a candidate; ValueError where it breaks the rule of `checked`."""
    kernel, config = plain(name), tile(*shape)
    more = {FORMS[kernel]: 1} if "'" in name else {}
    family, _, end = kernel.partition(".")
    config = Config(config.constants | more, config.num_warps, max_registers=config.max_registers)
    return checked(config, f"{OPERATORS[family]}.{end}")


class Bench:
    """Inputs of one length and a closure per kernel."""

    def __init__(self, n: int) -> None:
        self.z, self.dy = (torch.randn(n * n, C, device="cuda").to(BF) for _ in range(2))
        p = parameters("tr")
        self.norm, self.tw = (p[0], p[1]), pack(p[2:], BF)
        self.n = torch.randn_like(self.z)
        self.lw = pack(parameters("ln")[2:], BF)
        self.widths = ln.Widths(C, 4, 4)
        self.dys = [torch.randn(n * n, C, device="cuda").to(BF) for _ in range(4)]
        self.ds = torch.randn(4, n * n, device="cuda").to(BF)

    def call(self, name: str, shape: tuple[int, ...]) -> Fn:
        """The launch of one kernel with one tile."""
        t, rows, dy = config_of(name, shape), self.z, self.dy
        grads = [*self.dys, self.ds]
        calls: dict[str, Fn] = {
            "tr.forward": lambda: tr.forward(rows, self.norm, self.tw, EPS, t),
            "tr.input_gradient": lambda: tr.input_gradient(rows, self.norm, self.tw, dy, EPS, t),
            "tr.weight_gradient": lambda: tr.weight_gradient(self.n, self.tw, dy, t),
            "ln.forward": lambda: ln.forward(rows, self.norm, self.lw, self.widths, EPS, t),
            "ln.input_gradient": lambda: ln.input_gradient(rows, self.lw, self.widths, grads, EPS, t),
            "ln.weight_gradient": lambda: self.linear_weights(t),
        }
        return calls[plain(name)]

    def linear_weights(self, t: Config) -> Tensor:
        """The weight gradients of LayerNorm + Linear."""
        sums = ln.Sums.of(self.n, self.dys, t)
        shares = torch.empty((sums.programs * sums.splits, 2 * C), device="cuda")
        return ln.weight_gradient(self.n, self.norm, self.lw, self.dys, sums, shares)


def bare_group() -> Iterator[tuple[str, dict[str, Any]]]:
    """What the library's matrix products and the small launches take, for comparison."""
    for n in (384, 768):
        g, x = (torch.randn(n * n, C, device="cuda").to(BF) for _ in range(2))
        wide, w = torch.randn(n * n, 4 * C, device="cuda").to(BF), torch.randn(4 * C, C, device="cuda").to(BF)
        weights = parameters("tm")
        shares, partial = torch.randn(1152, 256, device="cuda"), torch.randn(33, 4 * C * C, device="cuda")
        jobs: dict[str, Fn] = {
            "g^T n 128x128": lambda g=g, x=x: torch.mm(g.t(), x),
            "g^T n 512x128": lambda wide=wide, x=x: torch.mm(wide.t(), x),
            "n w^T 128->512": lambda x=x, w=w: torch.mm(x, w.t()),
            "h w 512->128": lambda wide=wide, w=w: torch.mm(wide, w),
            "copy": lambda x=x, g=g: g.copy_(x),
            "pack": lambda weights=weights: pack(weights[2:6], BF),
            "fold": lambda shares=shares, partial=partial: fold([shares, shares], [partial], FULL),
        }
        for name, job in jobs.items():
            ms = do_bench(job, warmup=8, rep=30, return_mode="median")
            yield f"bare {name:16s} N={n} {ms:.4f} ms", {"bare": name, "n": n, "ms": ms}


def trace_group() -> Iterator[tuple[str, dict[str, Any]]]:
    """Time of every kernel in one forward and backward pass with the default tiles."""
    from torch.profiler import ProfilerActivity, profile

    for op in ("tr", "tm", "ln"):
        for n in (384, 768):
            z, grad = (torch.randn(n, n, C, device="cuda").to(BF) for _ in range(2))
            leaves = [t.detach().requires_grad_() for t in (z, *parameters(op))]
            fn, grads = functions(op)[0], output_gradients(op, grad)
            for _ in range(2):
                both_passes(fn, leaves, grads)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(5):
                    both_passes(fn, leaves, grads)
                torch.cuda.synchronize()
            found = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
            rows = [(e.key[:60], e.count / 5, e.self_device_time_total / 5e3) for e in found]
            total = sum(ms for _, _, ms in rows)
            text = "".join(f"\n      {ms:.4f} ms {count:g} x {key}" for key, count, ms in rows[:14])
            yield f"trace {op} N={n}: {total:.4f} ms{text}", {"trace": op, "n": n, "rows": rows}


def tile_jobs(family: str) -> list[tuple[str, tuple[int, ...]]]:
    """Kernels and tiles of the operators that `family` names."""
    return [(name, t) for name, ts in TILES.items() if name.startswith(family) for t in ts]


def tile_group(family: str, first: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Times of the tiles from `first` on, at two lengths; the job is announced before it runs."""
    benches = {n: Bench(n) for n in (384, 768)}
    for index, (name, shape) in enumerate(tile_jobs(family)[first:], first):
        yield "", {"begin": index}
        try:
            ms = {
                n: do_bench(b.call(name, shape), warmup=8, rep=30, return_mode="median")
                for n, b in benches.items()
            }
        except OutOfResources as error:
            yield f"{name} {shape}: {error}", {"kernel": name, "tile": list(shape), "refused": str(error)}
            continue
        yield "", {"kernel": name, "tile": list(shape), "ms": ms}


def compile_share(index: int, count: int) -> None:
    """Compile every `count`-th job from `index` on: the code runs, no kernel is launched."""
    launch = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = only_compile
    jobs: list[Fn] = [
        lambda op=op, n=n: whole(op, n, measure=False) for op in ("tm", "tr", "ln") for n in (64, 50)
    ]
    jobs += [lambda case=case: check(*case) for case in CHECKS]
    bench = Bench(64)
    jobs += [bench.call(name, t) for name, t in tile_jobs("")]
    for number, job in enumerate(jobs[index::count]):
        try:
            job()
        except Exception as error:  # the worker that needs this kernel will say more
            print(f"job {index + number * count}: {type(error).__name__} {error}"[:200], flush=True)


def work(group: str, first: int) -> None:
    """Run one group when the parent says so; results go to standard output, one JSON line each."""
    torch.zeros(1, device="cuda")
    sys.stdin.readline()
    kind, _, name = group.partition(":")
    found = (
        check_group()
        if kind == "check"
        else bare_group()
        if kind == "bare"
        else trace_group()
        if kind == "trace"
        else whole_group(name)
        if kind == "whole"
        else tile_group(name, first)
    )
    for text, row in found:
        print("@" + json.dumps({"kind": kind, "text": text, "row": row}), flush=True)


class Lab:
    """The parent: starts workers, collects their rows, never touches the GPU itself."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        """One line with the time since the start."""
        print(f"[{time.time() - START:5.1f}] {text}", flush=True)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """This script in another process, waiting for its first line of input."""
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def left(self) -> float:
        """Seconds until the lab must be over."""
        return max(1.0, LIMIT - (time.time() - START))

    def run(self, worker: subprocess.Popen[str], group: str, seconds: float) -> int | None:
        """Let a worker run; the index of the tile it died in, None when it finished."""
        try:
            text, trouble = worker.communicate("go\n", timeout=min(seconds, self.left()))
        except subprocess.TimeoutExpired:
            worker.kill()
            text, trouble = worker.communicate()
            trouble += "stopped: out of time"
        begun = 0
        for line in text.splitlines():
            if not line.startswith("@"):
                self.note(line)
                continue
            found = json.loads(line[1:])
            if found["text"]:
                self.note(found["text"])
            begun = found["row"].get("begin", begun)
            if "begin" not in found["row"]:
                self.rows.append({"kind": found["kind"], **found["row"]})
        (self.out / "fused_lab.json").write_text(json.dumps(self.rows, indent=1))
        if worker.returncode == 0:
            return None
        last = [t for t in trouble.strip().splitlines() if t][-1:]
        self.note(f"{group} ended early (code {worker.returncode}): {''.join(last)[:160]}")
        self.rows.append({"kind": "failure", "group": group, "begun": begun, "error": trouble[-2000:]})
        return begun

    def table(self) -> None:
        """The fastest tiles of every kernel beside the floor."""
        for name, (units, passes) in WORK.items():
            for n in ("384", "768"):
                own = [r for r in self.rows if plain(r.get("kernel", "")) == name and "ms" in r]
                rows = sorted((r["ms"][n], r["kernel"][len(name) :], r["tile"]) for r in own)
                size = 2 * int(n) ** 2 * C
                floor = max(units * size * C / 790e12, passes * size / 4.27e12) * 1e3
                best = "  ".join(f"{form}{tuple(t)} {ms:.4f}" for ms, form, t in rows[:4])
                self.note(f"{name:18s} N={n} floor {floor:.4f} | {best}")

    def compile(self) -> None:
        """Fill the compiler's cache with all processors."""
        count = max(1, (os.cpu_count() or 4) - 2)
        shares = [self.start("--share", str(k), str(count)) for k in range(count)]
        for k, share in enumerate(shares):
            try:
                text, trouble = share.communicate(timeout=min(60.0, self.left()))
            except subprocess.TimeoutExpired:
                share.kill()
                text, trouble = share.communicate()
            if text or share.returncode:
                last = "".join(trouble.strip().splitlines()[-1:])
                self.note(f"compile share {k} (code {share.returncode}): {text.strip()} {last[:160]}")
        self.note(f"compiled with {count} processes")

    def everything(self) -> None:
        """All groups in order of importance."""
        self.compile()
        groups = [f"whole:{op}" for op in ("tr", "tm", "ln")] + ["check:all"]
        groups += [f"tiles:{family}" for family in ("tr", "ln")]
        groups += ["trace:all", "bare:all"]
        waiting = {g: self.start("--group", g) for g in groups}
        for group, first in waiting.items():
            died = self.run(first, group, 40.0)
            for _ in range(2):
                if died is None or not group.startswith("tiles") or self.left() < 12:
                    break
                self.note(f"died in {tile_jobs(group.partition(':')[2])[died]}")
                died = self.run(self.start("--group", group, "--first", str(died + 1)), group, 30.0)
        self.table()


def ship(results: Path) -> None:
    """Put the fastest tile of every kernel (shares of the best time at both lengths) into the shipped file."""
    file = Path(__file__).resolve().parents[1] / "optimized" / "ops" / "tuned" / "nvidia-h200.json"
    entries = json.loads(file.read_text())
    rows = [r for r in json.loads(results.read_text()) if r.get("kind") == "tiles" and "ms" in r]
    for kernel in sorted({plain(r["kernel"]) for r in rows}):
        own = [r for r in rows if plain(r["kernel"]) == kernel]
        least = {n: min(r["ms"][n] for r in own) for n in own[0]["ms"]}
        best = min(own, key=lambda r: sum(r["ms"][n] / least[n] for n in least))
        family, _, name = kernel.partition(".")
        config = config_of(best["kernel"], tuple(best["tile"]))
        for dtype in ("bfloat16", "float16"):
            entries[f"{OPERATORS[family]}.{name}/{dtype}/{C}"] = config.to_json()
        print(kernel, best["tile"], best["ms"])
    file.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Parent or worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--share", type=int, nargs=2)
    parser.add_argument("--group")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--ship", type=Path, help="write the fastest tiles of a fused_lab.json into the package"
    )
    options = parser.parse_args()
    if options.ship:
        ship(options.ship)
    elif options.share:
        compile_share(*options.share)
    elif options.group:
        work(options.group, options.first)
    else:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        Lab(Path(options.out)).everything()


if __name__ == "__main__":
    main()
