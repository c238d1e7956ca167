"""Matrix products of float32 as three TF32 products: tiles against the library, at the widths of the diffusion module.

python bench/products_lab.py --out DIR      (a minute; --rows 3072 is 4 samples of 768 tokens)

Prints for every product the library's time in float32 and in TF32, the fastest tiles, and errors against fp64.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.linear import launch
from optimized.ops.tuning import Config

TILES = (
    (64, 64, 32, 4, 4), (64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 128, 32, 4, 3), (128, 64, 32, 4, 3),
    (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), (64, 32, 32, 4, 4), (64, 96, 32, 4, 3), (64, 48, 32, 4, 4),
)  # fmt: skip
"""BM, BN, BK, warps, stages."""


def problems(rows: int) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and terms of the products of a token block and an atom block."""
    atoms = 8 * rows
    return {
        "projection": (rows, 768, 768),
        "conditions": (rows, 768, 384),
        "hidden": (rows, 1536, 768),
        "out": (rows, 768, 1536),
        "d conditions": (rows, 384, 768),
        "atoms": (atoms, 128, 128),
        "atoms hidden": (atoms, 256, 128),
    }


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """x `[m, k]` and w `[n, k]`."""
    return torch.randn((m, k), device="cuda"), torch.randn((n, k), device="cuda") * k**-0.5


def config(tile: tuple[int, int, int, int, int]) -> Config:
    """The launch configuration of a tile."""
    bm, bn, bk, warps, stages = tile
    return Config({"BM": bm, "BN": bn, "BK": bk, "STAGES": stages}, warps)


def compiled(tile: tuple[int, int, int, int, int]) -> str:
    """Compile one tile, into Triton's cache; empty, or what went wrong."""
    try:
        launch.product(*operands(512, 512, 512), None, config(tile))
        torch.cuda.synchronize()
    except Exception as error:  # a tile that does not fit is a finding
        return f"{tile}: {type(error).__name__}: {str(error)[:100]}"
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
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        failures = [text for text in pool.imap_unordered(compiled, TILES) if text]
    print(f"{len(TILES)} compiled in {time.perf_counter() - began:.0f} s", *failures, sep="\n", flush=True)
    found = []
    for name, (m, n, k) in problems(args.rows).items():
        torch.manual_seed(0)
        x, w = operands(m, n, k)
        exact = x.double() @ w.double().t()

        def error(y: Tensor, exact: Tensor = exact) -> float:
            return ((y.double() - exact).norm() / exact.norm()).item()

        def library(x: Tensor = x, w: Tensor = w) -> Tensor:
            return torch.mm(x, w.t())

        row = {"product": name, "m": m, "n": n, "k": k}
        row |= {"fp32_ms": timed(library), "fp32_error": error(library())}
        torch.backends.cuda.matmul.allow_tf32 = True
        row |= {"tf32_ms": timed(library), "tf32_error": error(library())}
        torch.backends.cuda.matmul.allow_tf32 = False
        tiles = []
        for tile in TILES:

            def ours(x: Tensor = x, w: Tensor = w, tile: tuple = tile) -> Tensor:
                return launch.product(x, w, None, configs[tile])

            try:
                tiles.append((timed(ours), tile, error(ours())))
            except Exception as problem:  # does not launch: said above
                print(name, tile, type(problem).__name__, flush=True)
        tiles.sort()
        found.append(row | {"tiles": tiles})
        flop = 2e-9 * m * n * k
        best = "; ".join(
            f"{ms * 1e3:.1f} us {flop / ms:.0f} TFLOP/s {tile} error {e:.1e}" for ms, tile, e in tiles[:3]
        )
        print(
            f"{name:18s} {m}x{n}x{k}: fp32 {row['fp32_ms'] * 1e3:.1f} us ({flop / row['fp32_ms']:.0f} "
            f"TFLOP/s, error {row['fp32_error']:.1e}), tf32 {row['tf32_ms'] * 1e3:.1f} us ({row['tf32_error']:.1e}); {best}",
            flush=True,
        )
    (args.out / "products.json").write_text(json.dumps(found))


configs = {tile: config(tile) for tile in TILES}
"""Launches tell configurations apart by identity."""

if __name__ == "__main__":
    main()
