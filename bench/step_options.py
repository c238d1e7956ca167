"""Training steps of one variant with several sets of options, one after another in one process on one GPU.

python bench/step_options.py --out DIR [--variant megafold] [--seq-len 768,384] [--set NAME:KEY=VALUE;KEY=VALUE ...]

For choosing options, where machines differ by more than the options do: each set is built, takes `--steps` synchronised
steps, of which the first compiles and warms, and is thrown away. Bare steps: no sampler, no record, one process. For
numbers to publish use `megafold-bench sweep`. Writes one line a set to `step-options.jsonl`.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from megafold_bench import variants
from megafold_bench.errors import UserError

DIFFUSION = "adaptive_layer_norm,conditioned_transition"


def default_sets() -> list[str]:
    """Operators by default, replayed from graphs and not; from graphs with those of the diffusion module, with all."""
    from optimized.recipes import DEFAULT_OPS

    wide = f"ops={','.join(DEFAULT_OPS)},{DIFFUSION}"
    return [
        "plain:graphs=false",
        "graphs:graphs=true",
        f"wide+graphs:{wide};graphs=true",
        "all+graphs:ops=all;graphs=true",
    ]


def parse(text: str) -> tuple[str, dict[str, str]]:
    """Name and options of a set."""
    name, colon, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(";") if part]
    if not colon or any(not equals for _, equals, _ in pairs):
        raise UserError(f"--set {text}: write NAME:KEY=VALUE;KEY=VALUE")
    return name, {key: value for key, _, value in pairs}


def measure(variant: str, length: int, options: dict[str, str], steps: int) -> dict[str, Any]:
    """Seconds of every step, the first included, and peak memory in bytes (0 on a CPU)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    chosen = variants.get(variant)
    workload = chosen.build(chosen.resolve(options, length), length, 0, device)
    times = []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        workload.step(workload.transfer(workload.load()))
        wait()
        times.append(time.perf_counter() - began)
    return {
        "times_s": times,
        "allocated_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else 0,
    }


def main() -> None:
    """Every set at every length; one that fails is a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", default="megafold")
    parser.add_argument("--preset", default="af3")
    parser.add_argument("--seq-len", default="768,384")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--set", action="append", dest="sets", metavar="NAME:KEY=VALUE;KEY=VALUE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for length in map(int, args.seq_len.split(",")):
        for name, options in map(parse, args.sets or default_sets()):
            row: dict[str, Any] = {"variant": args.variant, "tokens": length, "set": name, "options": options}
            try:
                row |= measure(args.variant, length, {"preset": args.preset, **options}, args.steps)
                text = ", ".join(f"{t:.3f}" for t in row["times_s"])
                text += f" s, {row['allocated_bytes'] / 2**30:.1f} GiB allocated, {row['reserved_bytes'] / 2**30:.1f} reserved"
            except (
                Exception
            ) as error:  # out of memory, or an option the variant refuses: a line like the others
                row["error"] = text = f"{type(error).__name__}: {error}"[:300]
            print(f"{args.variant} N={length} {name}: {text}", flush=True)
            with (args.out / "step-options.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
