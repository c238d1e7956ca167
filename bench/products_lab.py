"""Matrix products of float32 as three TF32 products: tiles against the library, at the widths of the diffusion module.

python bench/products_lab.py --out DIR      (a minute; --rows 3072 is 4 samples of 768 tokens)

Prints for every product the library's time in float32 and in TF32, the fastest tiles, and errors against fp64.
"""

import argparse
import json
import multiprocessing
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.linear import launch
from optimized.ops.tuning import Config

TILES = (
    (128, 128, 32, 8, 3), (128, 128, 32, 8, 4), (128, 64, 32, 8, 3), (128, 64, 32, 4, 3), (64, 128, 32, 4, 3),
    (64, 64, 32, 4, 4), (64, 256, 32, 4, 3), (128, 256, 32, 8, 2), (64, 128, 64, 4, 2), (128, 64, 64, 8, 2),
)  # fmt: skip
"""BM, BN, BK, warps, stages."""
FORMS = ("nt", "nn", "tn")
"""x·wᵀ, its gradient to x, its gradient to w."""


def problems(rows: int) -> dict[str, tuple[int, int, int, str]]:
    """Rows, columns, terms and form of the products of a token block and an atom block."""
    atoms = 8 * rows
    return {
        "projection": (rows, 768, 768, "nt"),
        "four projections": (rows, 3072, 768, "nt"),
        "conditions": (rows, 768, 384, "nt"),
        "hidden": (rows, 1536, 768, "nt"),
        "out": (rows, 768, 1536, "nt"),
        "d input": (rows, 768, 768, "nn"),
        "d four inputs": (rows, 768, 3072, "nn"),
        "d weight": (768, 768, rows, "tn"),
        "d hidden weight": (1536, 768, rows, "tn"),
        "atoms": (atoms, 128, 128, "nt"),
        "atoms hidden": (atoms, 256, 128, "nt"),
        "d atoms weight": (128, 128, atoms, "tn"),
    }


def operands(m: int, n: int, k: int, form: str) -> tuple[Tensor, Tensor]:
    """x `[m, k]` and w `[n, k]` with the strides of the form."""
    x = torch.randn((k, m) if form == "tn" else (m, k), device="cuda")
    w = torch.randn((n, k) if form == "nt" else (k, n), device="cuda") * k**-0.5
    return x.t() if form == "tn" else x, w if form == "nt" else w.t()


def config(tile: tuple[int, int, int, int, int]) -> Config:
    """The launch configuration of a tile."""
    bm, bn, bk, warps, stages = tile
    return Config({"BM": bm, "BN": bn, "BK": bk, "STAGES": stages}, warps)


def compiled(job: tuple[str, tuple[int, int, int, int, int]]) -> str:
    """Compile one tile for one form, into Triton's cache; empty, or what went wrong."""
    form, tile = job
    try:
        launch.product(*operands(512, 512, 512, form), None, config(tile))
        torch.cuda.synchronize()
    except Exception as error:  # a tile that does not fit is a finding
        return f"{job}: {type(error).__name__}: {str(error)[:100]}"
    return ""


def timed(fn: object) -> float:
    """Median milliseconds."""
    return float(do_bench(fn, warmup=5, rep=25, return_mode="median"))


def main() -> None:
    """Compile in parallel, then measure one product after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    jobs = list(product(FORMS, TILES))
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        failures = [text for text in pool.imap_unordered(compiled, jobs) if text]
    print(f"{len(jobs)} compiled in {time.perf_counter() - began:.0f} s", *failures, sep="\n", flush=True)
    found = []
    for name, (m, n, k, form) in problems(args.rows).items():
        torch.manual_seed(0)
        x, w = operands(m, n, k, form)
        exact = x.double() @ w.double().t()

        def error(y: Tensor, exact: Tensor = exact) -> float:
            return ((y.double() - exact).norm() / exact.norm()).item()

        def library(x: Tensor = x, w: Tensor = w) -> Tensor:
            return torch.mm(x, w.t())

        row = {"product": name, "m": m, "n": n, "k": k, "form": form}
        row |= {"fp32_ms": timed(library), "fp32_error": error(library())}
        torch.backends.cuda.matmul.allow_tf32 = True
        row |= {"tf32_ms": timed(library), "tf32_error": error(library())}
        torch.backends.cuda.matmul.allow_tf32 = False
        tiles = []
        for tile, splits in product(TILES, (1, 4) if form == "tn" else (1,)):

            def ours(x: Tensor = x, w: Tensor = w, tile: tuple = tile, splits: int = splits) -> Tensor:
                y = launch.product(x, w, None, configs[tile], splits)
                return y[0] if splits == 1 else y.sum(0)

            try:
                tiles.append((timed(ours), tile, splits, error(ours())))
            except Exception as problem:  # does not launch: said above
                print(name, tile, type(problem).__name__, flush=True)
        tiles.sort()
        found.append(row | {"tiles": tiles})
        flop = 2e-9 * m * n * k
        best = "; ".join(
            f"{ms * 1e3:.1f} us {flop / ms:.0f} TFLOP/s {tile} splits {splits} error {e:.1e}"
            for ms, tile, splits, e in tiles[:3]
        )
        print(
            f"{name:18s} {m}x{n}x{k} {form}: fp32 {row['fp32_ms'] * 1e3:.1f} us ({flop / row['fp32_ms']:.0f} "
            f"TFLOP/s, error {row['fp32_error']:.1e}), tf32 {row['tf32_ms'] * 1e3:.1f} us ({row['tf32_error']:.1e}); {best}",
            flush=True,
        )
    (args.out / "products.json").write_text(json.dumps(found))


configs = {tile: config(tile) for tile in TILES}
"""Launches tell configurations apart by identity."""

if __name__ == "__main__":
    main()
