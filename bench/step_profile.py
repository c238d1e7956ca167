"""Where the time of one training step goes: device time by kernel and, on request, by PyTorch operator and shape; and
in which parts of the step the device waited for the host.

python bench/step_profile.py --variant megafold --seq-len 768 --out DIR [--preset af3] [--option ops=all]

After warm-up, some steps are timed alone and one more is profiled: a step under the profiler is slower on the host, so
shares are read from the profile and times, printed at once, from the steps before it. With `--operators` the profiler
takes minutes for the hundred thousand operators of a step. Writes `VARIANT-LENGTH.txt` and a `.json`.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch.profiler import ProfilerActivity, profile

from megafold_bench import variants


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="megafold")
    parser.add_argument("--seq-len", type=int, default=768)
    parser.add_argument("--preset", default="af3")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--steps", type=int, default=2, help="timed before the profile, at least 1")
    parser.add_argument("--operators", action="store_true", help="also by PyTorch operator and shape")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


SLICES = 40


def busy_shares(spans: list[tuple[float, float]]) -> list[float]:
    """The share of each of `SLICES` equal parts of the step in which a kernel ran, from (start, end) of all kernels."""
    first, last = min(s for s, _ in spans), max(e for _, e in spans)
    width = (last - first) / SLICES
    busy = [0.0] * SLICES
    reached = first
    for start, end in sorted(spans):
        start, reached = max(start, reached), max(end, reached)
        for index in range(min(int((start - first) / width), SLICES - 1), SLICES):
            left = first + index * width
            if left >= end:
                break
            busy[index] += max(min(end, left + width) - max(start, left), 0.0)
    return [share / width for share in busy]


def totals(events: Any, device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds and calls by kernel, and by operator with the shapes of its tensors, longest first."""
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    if device == "cuda":
        for event in events.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kernels[event.name] += event.self_device_time_total
                calls[event.name] += 1
    by_kernel = [{"kernel": name, "s": us * 1e-6, "calls": calls[name]} for name, us in kernels.most_common()]
    operators = []
    for row in events.key_averages(group_by_input_shape=True):
        us = row.self_device_time_total if device == "cuda" else row.self_cpu_time_total
        if us:
            operators.append(
                {"operator": row.key, "shapes": str(row.input_shapes), "s": us * 1e-6, "calls": row.count}
            )
    return by_kernel, sorted(operators, key=lambda entry: -entry["s"])


def main() -> None:
    """Build, warm up, time, profile, write."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    variant = variants.get(args.variant)
    options = {"preset": args.preset, **dict(pair.split("=", 1) for pair in args.option)}
    workload = variant.build(variant.resolve(options, args.seq_len), args.seq_len, 0, device)

    def step() -> float:
        synchronise()
        began = time.perf_counter()
        workload.step(workload.transfer(workload.load()))
        synchronise()
        return time.perf_counter() - began

    first = step()
    times = [step() for _ in range(args.steps)]
    title = f"{args.variant} N={args.seq_len} {' '.join(args.option)}: first step {first:.2f} s"
    print(f"{title}, then {', '.join(f'{t:.3f}' for t in times)} s", flush=True)
    activities = [ProfilerActivity.CUDA] if device == "cuda" else []
    if args.operators or device == "cpu":
        activities.append(ProfilerActivity.CPU)
    with profile(activities=activities, record_shapes=args.operators) as events:
        profiled = step()
    by_kernel, by_operator = totals(events, device)
    spans = [
        (e.time_range.start, e.time_range.end)
        for e in (events.events() if device == "cuda" else ())
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    shares = busy_shares(spans) if spans else []
    busy = sum(row["s"] for row in by_kernel)
    head = (
        f"{title}, median {statistics.median(times):.3f} s, profiled {profiled:.3f} s, kernels {busy:.3f} s, "
        f"{sum(row['calls'] for row in by_kernel)} launches"
    )
    lines = [
        head,
        f"busy, % of each {len(shares)}th of the step: " + " ".join(f"{100 * s:.0f}" for s in shares),
    ]
    lines += ["", "kernels"]
    lines += [f"{row['s']:9.4f} s {row['calls']:7d}  {row['kernel'][:150]}" for row in by_kernel[: args.rows]]
    lines += ["", "operators"]
    lines += [
        f"{row['s']:9.4f} s {row['calls']:7d}  {row['operator'][:60]}  {row['shapes'][:150]}"
        for row in by_operator[: args.rows]
    ]
    name = f"{args.variant}-{args.seq_len}" + "".join(f"-{o.replace('=', '_')}" for o in args.option)
    (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n")
    facts = {"head": head, "first_s": first, "times_s": times, "profiled_s": profiled, "busy": shares}
    (args.out / f"{name}.json").write_text(
        json.dumps({**facts, "kernels": by_kernel, "operators": by_operator[:400]})
    )
    print("\n".join(lines[: args.rows + 3]))


if __name__ == "__main__":
    main()
