"""Two blocks of Boltz-2's Pairformer, forward and backward under bf16 autocast: its own ways to run, and `apply`.

python bench/boltz_lab.py --out DIR [--n 384,768] [--modes eager,compile,kernels,compile+kernels,apply,apply+compile,apply+graphs]
    [--profile]

Float32 parameters and inputs, dropout active, no activation checkpointing, TF32 off, every weight away from its
initial zeros. `kernels` are cuEquivariance's, which Boltz calls where they are installed; `graphs` are PyTorch's own
`make_graphed_callables`, for lengths at which the host is slower than the kernels. One process a mode and length;
medians of `do_bench` over all gradients, the rise of memory over one pass (of graphs: with their capture), seconds of
the first two passes.
Writes `boltz.jsonl` with all samples.

python bench/boltz_lab.py --predict 768      the peak of `apply`, from what PyTorch would allocate: without a GPU
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor, nn

from optimized import apply

MODES = ("eager", "compile", "kernels", "compile+kernels", "apply", "apply+compile", "apply+graphs")
TOKEN_WIDTH, PAIR_WIDTH, BLOCKS = 384, 128, 2


def build(device: str) -> nn.Module:
    """The stack, seeded, in training mode."""
    from boltz.model.layers.pairformer import PairformerModule

    torch.manual_seed(0)
    stack = PairformerModule(TOKEN_WIDTH, PAIR_WIDTH, BLOCKS, v2=True)
    with torch.no_grad():
        for parameter in stack.parameters():
            noise = torch.randn_like(parameter)
            matrix = parameter.ndim > 1
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if matrix else 0.8 + 0.3 * noise)
    return stack.to(device).train()


class Positional(nn.Module):
    """The stack with nothing but tensors for arguments, as graphs are captured with."""

    def __init__(self, stack: nn.Module, kernels: bool) -> None:
        super().__init__()
        self.stack, self.kernels = stack, kernels

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The new s and z."""
        new: tuple[Tensor, Tensor] = self.stack(s, z, mask, pair_mask, use_kernels=self.kernels)
        return new


def measure(mode: str, n: int, repeat_ms: int, profiled: bool) -> dict[str, Any]:
    """Times in ms, memory in MiB, and what `apply` replaced, of one mode at one length; `profiled`: kernel by kernel too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    parts = mode.split("+")
    stack = build(device)
    report = str(apply(stack)) if "apply" in parts else ""
    stack = Positional(stack, "kernels" in parts)
    call: Any = torch.compile(stack, dynamic=False) if "compile" in parts else stack
    s = torch.randn(1, n, TOKEN_WIDTH, device=device, requires_grad=True)
    z = torch.randn(1, n, n, PAIR_WIDTH, device=device, requires_grad=True)
    ones, pairs = torch.ones(1, n, device=device), torch.ones(1, n, n, device=device)
    leaves = [s, z, *stack.parameters()]
    grads = [torch.randn_like(s), torch.randn_like(z)]

    def both() -> tuple[Tensor | None, ...]:
        with torch.autocast(device, torch.bfloat16):
            outputs = call(s, z, ones, pairs)
        return torch.autograd.grad(
            outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        )

    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    began = time.perf_counter()
    if "graphs" in parts:  # which hold all that a pass does, from here on
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            call = torch.cuda.make_graphed_callables(stack, (s, z, ones, pairs))
    for _ in range(2):
        both()
    if device == "cpu":
        return {"first_s": time.perf_counter() - began, "times_ms": [], "peak_mib": None, "report": report}
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    if "graphs" not in parts:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    from triton.testing import do_bench

    times = do_bench(both, warmup=100, rep=repeat_ms, return_mode="all")
    row = {"first_s": first, "times_ms": times, "peak_mib": peak, "report": report}
    return row | {"kernels_ms": by_kernel(both)} if profiled else row


def by_kernel(both: Callable[[], object]) -> dict[str, list[float]]:
    """Milliseconds and launches of every kernel of one pass, the longest first, as PyTorch's profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        both()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)
    return {row.key: [row.device_time_total / 1e3, row.count] for row in rows if row.device_time_total}


def predict(n: int) -> None:
    """Print what a pass of `apply` holds at its peak beyond its inputs, in MiB and by place."""
    import os

    os.environ["TRITON_INTERPRET"] = "1"  # the operators choose their kernels, which nothing here runs
    import step_memory
    from torch._subclasses.fake_tensor import FakeTensorMode

    step_memory.inside_operators()
    live, stack = step_memory.Live(), build("cpu")
    apply(stack)
    with FakeTensorMode(allow_non_fake_inputs=True):
        s, z = (
            torch.empty(1, *shape, requires_grad=True) for shape in ((n, TOKEN_WIDTH), (n, n, PAIR_WIDTH))
        )
        ones, pairs = torch.ones(1, n), torch.ones(1, n, n)
        grads = [torch.empty_like(s), torch.empty_like(z)]
        with live:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = stack(s, z, ones, pairs)
            torch.autograd.grad(outputs, [s, z, *stack.parameters()], grads)
    print(f"{live.peak / 2**20:.0f} MiB at the peak")
    for place, size in live.parts.most_common(12):
        print(f"  {size / 2**20:7.0f}  {place}")


def main() -> None:
    """Each mode and length in a process of its own; a failure is a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--predict", type=int, metavar="N")
    parser.add_argument("--n", default="384,768")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rep", type=int, default=1000, help="milliseconds of repeats")
    parser.add_argument("--profile", action="store_true", help="time every kernel of one pass too")
    parser.add_argument("--timeout", type=float, default=200)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.predict:
        predict(args.predict)
        return
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.rep, args.profile)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for n in args.n.split(","):
        for mode in args.modes.split(","):
            command = [
                sys.executable,
                __file__,
                "--out",
                str(args.out),
                "--rep",
                str(args.rep),
                "--one",
                mode,
                n,
                *(["--profile"] if args.profile else []),
            ]
            row: dict[str, Any] = {"mode": mode, "tokens": int(n)}
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
                lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [
                    "no output"
                ]
                row |= json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1]}
            except subprocess.TimeoutExpired:
                row["error"] = f"not done after {args.timeout:g} s"
            with (args.out / "boltz.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if times := row.get("times_ms"):
                low, middle, high = min(times), statistics.median(times), max(times)
                text = f"{middle:.2f} ms [{low:.2f}, {high:.2f}], {row['peak_mib']:.0f} MiB, first two {row['first_s']:.1f} s"
            else:
                text = str(row.get("error", f"first two {row.get('first_s', 0):.1f} s, no GPU"))[:200]
            print(f"boltz N={n} {mode}: {text}", flush=True)


if __name__ == "__main__":
    main()
