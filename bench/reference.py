"""The measurements of `reports/reference`, made again on this machine: part after part, within a time that is given.

python bench/reference.py --out DIR --budget 1700 [--parts verify,kernels,boltz] [--gpus 0,1]
python bench/reference.py --list
python bench/reference.py --out DIR --fill 300         # first compile what the steps need, side by side, for 300 s at most

A part is a command with a wall limit, run from the repository's root with its output in DIR/<part>/log.txt. A part for
which less than half its limit is left of the budget is passed over and named: call again with `--parts` for those. With several GPUs
each takes the next part as it gets free; what is bound by the host then shares the CPU, so give one GPU for such times.
Writes DIR/parts.jsonl: part, command, GPU, seconds, exit status.

The compiled variants of a step take minutes to compile for each length. `--fill` takes a step of each beforehand, as many at
a time as the GPUs' memory holds, for the caches of Inductor and Triton alone. What Inductor chose by timing is forgotten
again: it was timed on a busy device, and takes no long time.
"""

import argparse
import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
PEERS = "pytorch,inductor,flex,cuequivariance,trifast,megafold"
GRAPHED = "pytorch,cuequivariance,megafold"
"""From graphs: the baseline, and the fastest two where the host sets the pace."""
STEP_GIB = {256: 12, 384: 16, 512: 21, 640: 28, 768: 38}
"""What a step may hold by tokens, with some to spare."""
LADDER = tuple(STEP_GIB)
COMPILED = ("inductor", "flex", "cuequivariance", "trifast")
WAYS = (
    "--set plain:graphs=false --set 'reentrant:graphs=false;checkpointing=reentrant' --set graphs:graphs=true "
    "--set 'both:graphs=true;checkpointing=reentrant' --set 'all:compile=true;graphs=true;checkpointing=reentrant'"
)
"""To run `megafold` where the host sets the pace."""
IMPLEMENTATIONS = {
    "triangle_attention": "definition,compile,sdpa,flex,cuequivariance,trifast,megafold",
    "attention_pair_bias": "definition,compile,sdpa,flex,cuequivariance,megafold",
    "triangle_multiplication_outgoing": "definition,compile,cuequivariance,megafold",
    "transition": "definition,compile,megafold",
}
GPU_GIB = 125
LENGTHS = "384,450,600,768,900,1024,2048"


@dataclass(frozen=True)
class Part:
    """`command` with {out} for its folder; half of `limit_s` must be left of the budget to begin."""

    command: str
    limit_s: float


def parts() -> dict[str, Part]:
    """Every part by name, in the order in which they are worth having."""
    python = shlex.quote(sys.executable)
    cli, lab, tests = f"{python} cli.py", f"{python} bench", f"{python} -m pytest -q -m gpu tests/gpu"
    several = "-n 6 --dist loadgroup --ignore-glob=*harness* --ignore-glob=*systems*"
    found = {
        "tests-operators": Part(f"{tests} {several}", 500),
        "tests-systems": Part(f"{tests}/test_peer_systems_gpu.py", 500),
        "tests-harness": Part(f"{tests}/test_harness_gpu.py", 400),
        "verify": Part(f"{cli} verify", 500),
        "boltz": Part(f"{lab}/boltz_lab.py --out {{out}} --profile", 300),
        "attention": Part(f"{lab}/attention_lab.py --out {{out}} --budget 120", 150),
        "triangle": Part(f"{lab}/triangle_lab.py --out {{out}}", 150),
        "host": Part(f"{lab}/host_lab.py", 60),
        "host-parts": Part(f"{lab}/host_lab.py --parts", 60),
        "options": Part(f"{lab}/step_options.py --out {{out}} --seq-len 384,640 {WAYS}", 400),
    }
    for op, names in IMPLEMENTATIONS.items():
        kernels = f"{cli} kernels --op {op} --n {LENGTHS} --impl {names}"
        found[f"kernels-{op}"] = Part(f"{kernels} --out {{out}}", 600 if "attention" in op else 400)
    sweep = (
        f"{cli} sweep --preset af3 --device cuda --steps 2 --warmup 1 --repeats 1 --no-sampler --out {{out}}"
    )
    for tokens in LADDER:
        limit = 150 + 0.6 * tokens
        found[f"steps-{tokens}"] = Part(f"{sweep} --seq-lens {tokens} --variants {PEERS}", limit)
        graphs = f"{sweep} --seq-lens {tokens} --variants {GRAPHED} --option graphs=true"
        found[f"graphs-{tokens}"] = Part(graphs, limit / 2)
    offload = "--variants megafold --option offload=true"
    found["offload-768"] = Part(f"{sweep} --seq-lens 768 {offload}", 300)
    found["boundary-offload"] = Part(
        f"{cli} boundary --preset af3 --device cuda --granularity 128 --confirm 1 --probes-above 0 {offload} --start 3072 --out {{out}}",
        900,
    )
    for variant, start, limit in (("megafold", 2176, 500), ("inductor", 1664, 500), ("pytorch", 1536, 400),
        ("flex", 1664, 500), ("cuequivariance", 1664, 500), ("trifast", 1664, 500),
    ):  # fmt: skip
        search = f"{cli} boundary --preset af3 --device cuda --granularity 128 --confirm 1 --probes-above 0"
        found[f"boundary-{variant}"] = Part(
            f"{search} --variants {variant} --start {start} --out {{out}}", limit
        )
    return found


class Filling:
    """One step of every compiled variant at every length, side by side, for the compilers' caches."""

    def __init__(self, out: Path, gpus: list[str], limit_s: float) -> None:
        self._out, self._ends_at = out, time.monotonic() + limit_s
        self._room = dict.fromkeys(gpus, GPU_GIB)
        self._changed = threading.Condition()

    def run(self) -> None:
        """Until all are done or the time is over; then without what was chosen by timing."""
        self._out.mkdir(parents=True, exist_ok=True)
        jobs = [(name, tokens) for tokens in reversed(LADDER) for name in COMPILED]
        threads = [threading.Thread(target=self._step, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for choice in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
            choice.unlink()

    def _left(self) -> float:
        return max(0.0, self._ends_at - time.monotonic())

    def _step(self, variant: str, tokens: int) -> None:
        need = STEP_GIB[tokens]
        with self._changed:
            self._changed.wait_for(lambda: max(self._room.values()) >= need, self._left())
            gpu = max(self._room, key=lambda name: self._room[name])
            if self._room[gpu] < need:
                print(f"fill {variant} {tokens}: no time left", flush=True)
                return
            self._room[gpu] -= need
        name = f"{variant}-{tokens}"
        command = [sys.executable, "bench/step_options.py", "--variant", variant, "--seq-len", str(tokens)]
        command += ["--steps", "1", "--set", "fill:", "--out", str(self._out / name)]
        with (self._out / f"{name}.txt").open("w") as log:
            status = _call(command, log, gpu, self._left())
        print(f"fill {variant} {tokens}: {status}", flush=True)
        with self._changed:
            self._room[gpu] += need
            self._changed.notify_all()


def _call(command: list[str], log: IO[str], gpu: str, limit_s: float) -> int | str:
    """Exit status of a command on one GPU, or that it was killed, with what it had started, at its limit."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not done after {limit_s:.0f} s"


class Runner:
    """Takes parts from a queue, one GPU each at a time."""

    def __init__(self, out: Path, ends_at: float) -> None:
        self._out, self._ends_at = out, ends_at
        self._writing = threading.Lock()
        self.passed_over: list[str] = []

    def work(self, gpu: str, waiting: "queue.SimpleQueue[tuple[str, Part]]") -> None:
        """Until no part is left."""
        while True:
            try:
                name, part = waiting.get_nowait()
            except queue.Empty:
                return
            limit_s = min(part.limit_s, self._ends_at - time.monotonic())
            if limit_s < part.limit_s / 2:
                self.passed_over.append(name)
                continue
            self._run(name, part, gpu, limit_s)

    def _run(self, name: str, part: Part, gpu: str, limit_s: float) -> None:
        folder = self._out / name
        folder.mkdir(parents=True, exist_ok=True)
        command = part.command.format(out=shlex.quote(str(folder / "run")))
        began = time.monotonic()
        with (folder / "log.txt").open("w") as log:
            status = _call(shlex.split(command), log, gpu, limit_s)
        row = {
            "part": name,
            "command": command,
            "gpu": gpu,
            "seconds": round(time.monotonic() - began, 1),
            "status": status,
        }
        with self._writing:
            with (self._out / "parts.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {status}, {row['seconds']} s", flush=True)


def main() -> None:
    """Run the parts that are named, or all."""
    known = parts()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("reference"))
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--parts", help="names, separated by commas; all if not given")
    parser.add_argument("--gpus", default="0", help="numbers of GPUs, separated by commas")
    parser.add_argument("--fill", type=float, metavar="SECONDS", help="fill the compilers' caches first")
    parser.add_argument("--list", action="store_true", help="print the parts and run none")
    args = parser.parse_args()
    names = args.parts.split(",") if args.parts else list(known)
    for name in names:
        if name not in known:
            parser.error(f"--parts {name}: choose from {', '.join(known)}")
    if args.list:
        for name in names:
            print(f"{name:34s} {known[name].limit_s:5.0f} s  {known[name].command}")
        return
    ends_at = time.monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    if args.fill:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(args.out.resolve() / "inductor"))
        Filling(args.out.resolve() / "fill", args.gpus.split(","), args.fill).run()
    waiting: queue.SimpleQueue[tuple[str, Part]] = queue.SimpleQueue()
    for name in names:
        waiting.put((name, known[name]))
    runner = Runner(args.out.resolve(), ends_at)
    workers = [threading.Thread(target=runner.work, args=(gpu, waiting)) for gpu in args.gpus.split(",")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if runner.passed_over:
        print(f"no time for: --parts {','.join(runner.passed_over)}")


if __name__ == "__main__":
    main()
