# ruff: noqa
"""One GPU call: compile many tile shapes in parallel, check against fp64, time them, then the whole operators.

python bench/fused_lab.py --out DIR      (about three minutes on one H200)
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from fused_variants import forward_variant  # noqa: E402

from optimized.ops.launching import in_dtype, packed  # noqa: E402
from optimized.ops.launching import chosen  # noqa: E402
from optimized.ops.launching import tile as config  # noqa: E402
from optimized.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference  # noqa: E402
from optimized.ops.transition import launch as tr  # noqa: E402
from optimized.ops.transition import transition, transition_reference  # noqa: E402
from optimized.ops.triangle_multiplication import (  # noqa: E402
    TriangleWeights,
    triangle_multiplication,
    triangle_multiplication_reference,
)
from optimized.ops.triangle_multiplication import launch as tm  # noqa: E402

C, EPS, BF = 128, 1e-5, torch.bfloat16
START = time.time()


def note(*parts):
    print(f"[{time.time() - START:6.1f}]", *parts, flush=True)


def configure(shape):
    """Rows, width, warps, stages and, optionally, a cap on registers per thread."""
    found = config(*shape[:4])
    if len(shape) > 4:
        found.constants["maxnreg"] = shape[4]
    return found


def candidates():
    jobs = []

    def add(name, rows, widths, warps, stages):
        jobs.extend((name, t) for t in itertools.product(rows, widths, warps, stages))

    add("tr.forward", (128,), (32, 64), (8,), (2, 3))
    add("tr.forward", (128,), (128,), (8,), (2,))
    add("tr.forward", (64,), (32, 64), (4,), (2, 3))
    add("tr.forward", (256,), (32, 64), (16,), (2,))
    add("tr.input_gradient", (128,), (32, 64), (8,), (1, 2, 3))
    add("tr.input_gradient", (64,), (32, 64), (4, 8), (2,))
    add("tr.weight_gradient", (64, 128), (32,), (8,), (1, 2, 3))
    add("tr.weight_gradient", (64, 128), (64,), (8,), (1, 2))
    add("tr.weight_gradient", (64,), (32,), (4,), (2,))
    add("tr.weight_gradient", (64,), (128,), (16,), (2,))
    add("tm.project", (64,), (32, 64, 128), (4,), (2, 3))
    add("tm.project", (128,), (32, 64), (8,), (2, 3))
    add("tm.project", (128,), (128,), (8,), (2,))
    add("tm.project_input", (64,), (32, 64), (4,), (1, 2, 3))
    add("tm.project_input", (128,), (32, 64), (8,), (1, 2, 3))
    add("tm.project_weight", (64, 128), (64,), (8,), (1, 2, 3))
    add("tm.project_weight", (64,), (128,), (8,), (2,))
    add("tm.output", (64,), (32, 64), (4, 8), (1, 2))
    add("tm.output", (64,), (128,), (4, 8), (1,))
    add("tm.output", (128,), (32, 64), (8,), (1, 2))
    add("tm.output_input", (64,), (32,), (4, 8), (1, 2))
    add("tm.output_input", (64,), (64,), (8,), (1, 2))
    add("tm.output_input", (128,), (32,), (8,), (1, 2))
    add("tm.output_weight", (64, 128), (64,), (8,), (1, 2))
    add("tm.output_weight", (64,), (128,), (8,), (1,))
    add("tm.output_weight", (32,), (64, 128), (8,), (1, 2))
    jobs += [("tr.forward", t) for t in ((128, 32, 8, 3, 128), (64, 32, 4, 2, 128), (64, 64, 4, 2, 168))]
    jobs += [("tr.input_gradient", t) for t in ((64, 32, 4, 2, 168), (128, 32, 8, 2, 128))]
    jobs += [("tr.weight_gradient", (128, 32, 8, 1, 128)), ("tr.weight_gradient", (64, 32, 4, 2, 168))]
    jobs += [("tm.project_input", t) for t in ((64, 32, 4, 2, 168), (64, 32, 4, 2, 128), (128, 32, 8, 2, 128))]
    jobs += [("tm.project_weight", (64, 64, 8, 2, 128)), ("tm.project_weight", (64, 32, 4, 2, 168))]
    jobs += [("tm.output", (64, 64, 4, 2, 168)), ("tm.output", (64, 32, 4, 2, 128))]
    jobs += [("tm.output_input", (64, 32, 8, 2, 128)), ("tm.output_input", (64, 32, 4, 2, 168))]
    jobs += [("tm.output_weight", (64, 32, 8, 1)), ("tm.output_weight", (64, 32, 8, 2)), ("tm.output_weight", (64, 32, 8, 1, 128))]
    return list(dict.fromkeys(jobs))


def transition_parameters(c=C, factor=4, dtype=torch.float32):
    g = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    h = factor * c
    values = [1 + 0.2 * normal(c), 0.1 * normal(c), normal(h, c) / c**0.5, normal(h, c) / c**0.5]
    return [v.to(dtype) for v in (*values, normal(c, h) / h**0.5)]


def triangle_parameters(c=C, h=C, dtype=torch.float32):
    g = torch.Generator("cuda").manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    values = [1 + 0.2 * normal(c), 0.1 * normal(c), *(normal(h, c) / c**0.5 for _ in range(4))]
    values += [1 + 0.2 * normal(h), 0.1 * normal(h), normal(c, h) / h**0.5, normal(c, c) / c**0.5]
    return TriangleWeights(*(v.to(dtype) for v in values))


def layer_norm_parameters():
    g = torch.Generator("cuda").manual_seed(4)
    p = transition_parameters()
    return [p[0], p[1], *(torch.randn(h, C, device="cuda", generator=g) / C**0.5 for h in (128, 128, 128, 128, 4))]


def layer_norm_lists(z, *p):
    return layer_norm_linear(z, p[0], p[1], list(p[2:6]), p[6])


def layer_norm_lists_reference(z, *p):
    return layer_norm_linear_reference(z, p[0], p[1], list(p[2:6]), p[6])


class Bench:
    """Inputs of one length and a closure per kernel."""

    def __init__(self, n):
        self.z = torch.randn(n, n, C, device="cuda").to(BF)
        self.dy = torch.randn(n, n, C, device="cuda").to(BF)
        p = transition_parameters(dtype=BF)
        self.norm, self.tw = (p[0], p[1]), in_dtype(p[2:], BF)
        w = triangle_parameters(dtype=BF)
        self.shape = tm.Shape.of(self.z, C)
        self.norm_in = (w.norm_in_weight, w.norm_in_bias)
        self.norms = (w.norm_out_weight, w.norm_out_bias, *self.norm_in)
        self.ps, self.ends = packed([w.a_p, w.b_p, w.a_g, w.b_g], BF), [w.out, w.g]
        self.grad = torch.randn(2 * C, self.shape.padded, self.shape.padded, device="cuda").to(BF)
        self.x = self.grad[:C]
        self.n = torch.randn(self.shape.padded**2 * C, device="cuda").to(BF)
        self.dn = torch.randn_like(self.z)

    def call(self, name, shape):
        tile = configure(shape)
        z, dy, rows = self.z, self.dy, self.z.view(-1, C)
        grad_rows = dy.view(-1, C)
        s = self.shape
        return {
            "tr.forward": lambda: tr.forward(rows, self.norm, self.tw, EPS, BF, tile),
            "tr.input_gradient": lambda: tr.input_gradient(rows, self.norm, self.tw, grad_rows, EPS, tile),
            "tr.weight_gradient": lambda: tr.weight_gradient(rows, self.tw, grad_rows, tile),
            "tm.project": lambda: tm.project_forward(z, self.norm_in, self.ps, None, s, EPS, tile),
            "tm.output": lambda: tm.output_forward(self.x, z, self.norms, self.ends, s, EPS, tile),
            "tm.output_input": lambda: tm.output_input_gradient(self.x, z, self.norms, self.ends, dy, s, EPS, tile),
            "tm.output_weight": lambda: tm.output_weight_gradient(self.x, z, self.norms, self.ends, dy, s, EPS, tile),
            "tm.project_input": lambda: tm.project_input_gradient(
                z, self.norm_in, self.ps, None, self.grad, self.dn, self.n, s, EPS, tile
            ),
            "tm.project_weight": lambda: tm.project_weight_gradient(self.n, self.grad, self.ps, s, tile),
        }[name]


# GEMM units of 2·N²·c·c FLOP, and passes over N²·c bf16 values, for the floors in the table.
WORK = {
    "tr.forward": (12, 2),
    "tr.input_gradient": (20, 4),
    "tr.weight_gradient": (24, 2),
    "tm.project": (4, 3),
    "tm.output": (2, 3),
    "tm.output_input": (4, 5),
    "tm.output_weight": (4, 3),
    "tm.project_input": (8, 6),
    "tm.project_weight": (8, 3),
}


def floor_ms(name, n):
    units, passes = WORK[name]
    return max(units * 2 * n * n * C * C / 790e12, passes * n * n * C * 2 / 4.27e12) * 1e3


# Forward kernel with one thing changed: activation (exp2 sigmoid, tanh, none) and layer norm left out.
PROBES = [
    (tile, activation, norm)
    for tile in ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2))
    for activation, norm in ((0, 1), (1, 1), (2, 1), (0, 0))
]


def probe(bench, tile, activation, norm):
    x, out = bench.z.view(-1, C), bench.dy.view(-1, C)
    rows = x.shape[0]
    forward_variant[(-(-rows // tile[0]),)](
        x, *bench.norm, *bench.tw, out, rows, EPS, C=C, H=4 * C, BC=C, BM=tile[0], BN=tile[1],
        STAGES=tile[3], AHEAD=0, ACT=activation, NORM=norm, SPECIALISE=False, num_warps=tile[2],
    )  # fmt: skip


def probes(results):
    bench = Bench(768)
    for job in PROBES:
        ms = do_bench(lambda job=job: probe(bench, *job), warmup=8, rep=30, return_mode="median")
        note(f"transition forward N=768 {list(job[0])} activation {job[1]} norm {job[2]}: {ms:.4f}")
        results.append({"tile": list(job[0]), "activation": job[1], "norm": job[2], "ms": ms})
    for n in (384, 768):
        d, rows = torch.randn(n * n, 256, device="cuda").to(BF), torch.randn(n * n, C, device="cuda").to(BF)
        ms = do_bench(lambda d=d, rows=rows: torch.mm(d.t(), rows), return_mode="median")
        note(f"cuBLAS [256, M]·[M, 128], M={n * n}: {ms:.4f}")
        results.append({"cublas_rows": n * n, "ms": ms})
    big, empty = torch.randn(2**29, device="cuda").to(BF), torch.empty(2**29, device="cuda", dtype=BF)
    ms = do_bench(lambda: empty.copy_(big), return_mode="median")
    note(f"copy {4 * 2**29 / ms / 1e9:.2f} TB/s")


def compile_share(index, count):
    bench = Bench(64)
    for job in PROBES[index::count]:
        probe(bench, *job)
    for name, tile in candidates()[index::count]:
        try:
            bench.call(name, tile)()
            torch.cuda.synchronize()
        except Exception as error:
            print("compile", name, tile, type(error).__name__, str(error)[:120], flush=True)
    if index < len(CHECKS):
        check(*CHECKS[index])


def time_tiles(results):
    for n in (384, 768):
        bench = Bench(n)
        for name, tile in candidates():
            try:
                ms = do_bench(bench.call(name, tile), warmup=8, rep=30, return_mode="median")
            except Exception as error:
                ms = float("inf")
                note(name, tile, type(error).__name__, str(error)[:80])
            results.append({"kernel": name, "n": n, "tile": list(tile), "ms": ms})
        del bench
        torch.cuda.empty_cache()


def best_tiles(results):
    best = {}
    for name in WORK:
        for n in (384, 768):
            ranked = sorted((r for r in results if r["kernel"] == name and r["n"] == n), key=lambda r: r["ms"])
            best[name, n] = ranked
            text = "  ".join(f"{r['tile']} {r['ms']:.4f}" for r in ranked[:4])
            note(f"{name:20s} N={n} floor {floor_ms(name, n):.4f} | {text}")
    return {name: tuple(best[name, 768][0]["tile"]) for name in WORK}


def use(tiles):
    for name, tile in tiles.items():
        module = tr if name.startswith("tr.") else tm
        module.HALF[name[3:]] = configure(tile)
    chosen.cache_clear()


def errors(fn, ref, tensors, grad):
    def evaluate(f, dtype):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        y = f(*leaves)
        ys, grads = (y, grad) if isinstance(y, list) else ([y], [grad])
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, [g.to(y.dtype) for g, y in zip(grads, ys, strict=True)])]

    ours, again, eager, exact = (evaluate(fn, None), evaluate(fn, None), evaluate(ref, None), evaluate(ref, torch.float64))

    def distance(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    pairs = [(distance(a, d), distance(e, d)) for a, e, d in zip(ours, eager, exact, strict=True)]
    worst = max(pairs, key=lambda p: p[0] / p[1])
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    return {"ours": worst[0], "eager": worst[1], "ratio": worst[0] / worst[1], "output": pairs[0], "bitwise": same}


CHECKS = [
    ("tm", 96, 128, torch.bfloat16, torch.float32),
    ("tm", 101, 128, torch.bfloat16, torch.bfloat16),
    ("tm", 101, 64, torch.float16, torch.float32),
    ("tm", 48, 128, torch.float32, torch.float32),
    ("tr", 90, 128, torch.bfloat16, torch.float32),
    ("tr", 101, 64, torch.float16, torch.float32),
    ("tr", 20, 384, torch.bfloat16, torch.float32),
    ("tr", 32, 128, torch.float32, torch.float32),
    ("ln", 75, 128, torch.bfloat16, torch.float32),
]


def check(op, n, c, dtype, parameter_dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    g = torch.Generator("cuda").manual_seed(3)
    z = (torch.randn(n, n, c, device="cuda", generator=g) * 2 + 0.3).to(dtype)
    grad = torch.randn(n, n, c, device="cuda", generator=g).to(dtype)
    try:
        if op == "tr":
            p = transition_parameters(c, 4, parameter_dtype)
            return [errors(transition, transition_reference, (z, *p), grad)]
        if op == "ln":
            grads = [grad] * 4 + [grad[..., :4].movedim(2, 0).contiguous()]
            return [errors(layer_norm_lists, layer_norm_lists_reference, (z, *layer_norm_parameters()), grads)]
        p = triangle_parameters(c, c, parameter_dtype)
        mask = torch.rand(n, n, device="cuda", generator=g) > 0.2
        rows = []
        for outgoing, m in ((True, mask), (False, None)):

            def run(f, outgoing=outgoing, m=m):
                return lambda z, *w: f(z, TriangleWeights(*w), outgoing, m)

            rows.append(errors(run(triangle_multiplication), run(triangle_multiplication_reference), (z, *p), grad))
        return rows
    except Exception as error:
        note("check", op, n, c, dtype, type(error).__name__, str(error)[:200])
        return []


def whole(label, fn, tensors, grad, results):
    leaves = [t.detach().requires_grad_() for t in tensors]

    def forward():
        with torch.no_grad():
            return fn(*leaves)

    def both():
        y = fn(*leaves)
        return y, torch.autograd.grad(y, leaves, grad)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    held = both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    del held
    f = do_bench(forward, warmup=15, rep=60, return_mode="median")
    fb = do_bench(both, warmup=15, rep=60, return_mode="median")
    host = time.perf_counter()
    for _ in range(20):
        both()
    host = (time.perf_counter() - host) / 20 * 1e3
    torch.cuda.synchronize()
    note(f"{label:46s} fwd {f:.4f}  fwd+bwd {fb:.4f}  peak {peak:.0f} MiB  (wall per queued call {host:.2f} ms)")
    results.append({"case": label, "forward_ms": f, "both_ms": fb, "peak_mib": peak, "host_ms": host})


def operators(results):
    for n in (384, 450, 768):
        z, grad = torch.randn(n, n, C, device="cuda").to(BF), torch.randn(n, n, C, device="cuda").to(BF)
        for dtype in (BF, torch.float32):
            whole(f"transition N={n} {dtype}", transition, (z, *transition_parameters(dtype=dtype)), grad, results)
    for n in (384, 450, 768, 1024, 2048):
        z, grad = torch.randn(n, n, C, device="cuda").to(BF), torch.randn(n, n, C, device="cuda").to(BF)
        if n in (384, 768):
            p = layer_norm_parameters()
            whole(f"layer norm linear 4x128 + 4 N={n}", layer_norm_lists, (z, *p), [grad] * 4 + [grad[..., :4].movedim(2, 0).contiguous()], results)
        for outgoing in (True, False):
            for dtype in (BF, torch.float32) if n == 384 else (BF,):
                whole(
                    f"triangle multiplication N={n} {'out' if outgoing else 'in'} {dtype}",
                    lambda z, *w, o=outgoing: triangle_multiplication(z, TriangleWeights(*w), o),
                    (z, *triangle_parameters(dtype=dtype)),
                    grad,
                    results,
                )


def contractions(results):
    for n in (384, 768, 1024):
        ab = torch.randn(2 * C, n, n, device="cuda").to(BF)
        for outgoing in (True, False):
            f = do_bench(lambda ab=ab, o=outgoing: tm.contract(ab, o), return_mode="median")
            b = do_bench(lambda ab=ab, o=outgoing: tm.contract_backward(ab[:C], ab, o), return_mode="median")
            note(f"bmm N={n} {'out' if outgoing else 'in'}: fwd {f:.4f} bwd {b:.4f} ({2 * C * n**3 / f / 1e9:.0f} TFLOP/s)")
            results.append({"bmm": n, "outgoing": outgoing, "forward_ms": f, "backward_ms": b})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--share", type=int, nargs=2)
    options = parser.parse_args()
    if options.share:
        compile_share(*options.share)
        return
    count = max(1, (os.cpu_count() or 4) - 2)
    workers = [
        subprocess.Popen([sys.executable, __file__, "--share", str(k), str(count)]) for k in range(count)
    ]
    for w in workers:
        w.wait()
    note(f"compiled {len(candidates())} tiles in {count} processes")
    data = {"tiles": [], "checks": [], "whole": [], "bmm": [], "probes": [], "device": torch.cuda.get_device_name()}
    try:
        for case in CHECKS:
            rows = check(*case)
            data["checks"].append({"case": [str(v) for v in case], "rows": rows})
            for r in rows:
                note("check", *case, f"worst {r['ours']:.2e} eager {r['eager']:.2e} ratio {r['ratio']:.2f} bitwise {r['bitwise']}")
        time_tiles(data["tiles"])
        best = best_tiles(data["tiles"])
        data["best"] = best
        use(best)
        contractions(data["bmm"])
        operators(data["whole"])
        probes(data["probes"])
    finally:
        Path(options.out, "fused_lab.json").write_text(json.dumps(data, indent=1))
    note("done")


if __name__ == "__main__":
    main()
