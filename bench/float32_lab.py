"""Attention in float32 as three TF32 products, as the diffusion module runs it: tiles and depths of the pipeline.

python bench/float32_lab.py      (under 45 s on one H200)

4 samples (a chunk), 16 heads of 48 channels, 768 tokens, no mask; medians of `do_bench` by kernel.
"""

import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor

from optimized.ops.attention import launch
from optimized.ops.tuning import Config

SAMPLES, HEADS, WIDTH, TOKENS = 4, 16, 48, 768
WORKERS = 8


def rows(bq: int, bk: int, *stages: int) -> list[Config]:
    """Tiles of one row with these depths."""
    return [Config({"ROWS": 1, "BQ": bq, "BK": bk, "STAGES": s}) for s in stages]


CANDIDATES: dict[str, list[Config]] = {
    "forward": [*rows(64, 32, 1, 2, 3), *rows(64, 16, 2, 3), *rows(32, 32, 2)],
    "grad_kv": [*rows(16, 64, 1, 2, 3), *rows(32, 64, 1, 2)],
    "grad_bias": [Config({"BQ": 64, "BK": 32, "STAGES": s}) for s in (1, 2, 3)],
    "grad_q": [*rows(64, 32, 1, 2, 3), *rows(64, 16, 2, 3)],
}


def kernels(n: int) -> dict[str, Callable[[Config], None]]:
    """Every kernel on one problem of n tokens, ready to be launched with a tile."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    q, k, v, do = (normal(1, SAMPLES, n, HEADS, WIDTH).transpose(2, 3) for _ in range(4))
    bias = normal(1, 1, HEADS, n, n)
    call = launch.make_call(q, k, v, bias, None, WIDTH**-0.5, "tf32x3", True)
    turned = launch.turned(call)
    o, lse = torch.empty_like(q), torch.empty((2, 1, SAMPLES, HEADS, n), device="cuda")
    launch.launch_forward(call, o, lse, CANDIDATES["forward"][0])
    lse2, delta = launch.launch_statistics(call, o, do, lse[0], None)
    dq, dk, dv, dbias = (torch.empty_like(x) for x in (q, k, v, bias))
    return {
        "forward": lambda tile: launch.launch_forward(call, o, lse, tile),
        "grad_kv": lambda tile: launch.launch_grad_kv(turned, do, lse2, delta, dk, dv, tile),
        "grad_bias": lambda tile: launch.launch_grad_bias(call, do, lse2, delta, dbias, tile),
        "grad_q": lambda tile: launch.launch_grad_q(call, do, lse2, delta, dq, tile),
    }


def compile_share(index: int) -> None:
    """Compile every `WORKERS`-th candidate into Triton's cache; what fails is found again, and reported, later."""
    run = kernels(128)
    jobs = [(kernel, tile) for kernel, tiles in CANDIDATES.items() for tile in tiles]
    for kernel, tile in jobs[index::WORKERS]:
        try:
            run[kernel](tile)
        except Exception as error:  # out of shared memory or registers
            print(f"compile {kernel} {tile.constants}: {type(error).__name__}", file=sys.stderr)


def main() -> None:
    """Compile in parallel, then time."""
    from triton.testing import do_bench

    with get_context("spawn").Pool(WORKERS) as pool:
        pool.map(compile_share, range(WORKERS))
    run = kernels(TOKENS)
    for kernel, tiles in CANDIDATES.items():
        for tile in tiles:
            try:
                ms = do_bench(lambda k=kernel, t=tile: run[k](t), warmup=5, rep=20, return_mode="median")
                print(f"{kernel} {tile.constants} {ms:.4f} ms", flush=True)
            except Exception as error:  # the same
                print(f"{kernel} {tile.constants} {type(error).__name__}", flush=True)


if __name__ == "__main__":
    main()
