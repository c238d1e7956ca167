"""The measurements of `reports/reference`, made again on this machine: part after part, within a time that is given.

python bench/reference.py --out DIR --budget 1700 [--parts verify,kernels,boltz] [--gpus 0,1]
python bench/reference.py --list

A part is a command with a wall limit, run from the repository's root with its output in DIR/<part>/log.txt. A part for
which too little of the budget is left is passed over and named: call again with `--parts` for those. With several GPUs
each takes the next part as it gets free; what is bound by the host then shares the CPU, so give one GPU for such times.
Writes DIR/parts.jsonl: part, command, GPU, seconds, exit status.
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

ROOT = Path(__file__).resolve().parents[1]
PEERS = "pytorch,inductor,flex,cuequivariance,trifast,megafold"
LADDER = (256, 384, 512, 640, 768)
LENGTHS = "384,450,600,768,900,1024,2048"


@dataclass(frozen=True)
class Part:
    """`command` with {out} for its folder; `limit_s` is also what must be left of the budget to begin."""

    command: str
    limit_s: float


def parts() -> dict[str, Part]:
    """Every part by name, in the order in which they are worth having."""
    python = shlex.quote(sys.executable)
    cli, lab, tests = f"{python} cli.py", f"{python} bench", f"{python} -m pytest -q -m gpu tests/gpu"
    found = {
        "tests-operators": Part(f"{tests} --ignore-glob=*harness* --ignore-glob=*systems*", 400),
        "tests-systems": Part(f"{tests}/test_peer_systems_gpu.py", 200),
        "tests-harness": Part(f"{tests}/test_harness_gpu.py", 400),
        "verify": Part(f"{cli} verify", 200),
        "boltz": Part(f"{lab}/boltz_lab.py --out {{out}}", 300),
        "triangle": Part(f"{lab}/triangle_lab.py --out {{out}}", 150),
        "host": Part(f"{lab}/host_lab.py", 60),
    }
    for op in ("triangle_attention", "triangle_multiplication_outgoing", "transition", "attention_pair_bias"):
        found[f"kernels-{op}"] = Part(f"{cli} kernels --op {op} --n {LENGTHS} --out {{out}}", 300)
    for tokens in LADDER:
        sweep = f"{cli} sweep --preset af3 --device cuda --variants {PEERS} --seq-lens {tokens}"
        limit = 150 + 0.6 * tokens
        found[f"steps-{tokens}"] = Part(
            f"{sweep} --steps 2 --warmup 1 --repeats 1 --no-sampler --out {{out}}", limit
        )
    for variant, start, limit in (("megafold", 2176, 500), ("inductor", 1664, 500), ("pytorch", 1536, 400)):
        search = f"{cli} boundary --preset af3 --device cuda --granularity 128 --confirm 1 --probes-above 0"
        found[f"boundary-{variant}"] = Part(
            f"{search} --variants {variant} --start {start} --out {{out}}", limit
        )
    return found


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
            if time.monotonic() + part.limit_s > self._ends_at:
                self.passed_over.append(name)
                continue
            self._run(name, part, gpu)

    def _run(self, name: str, part: Part, gpu: str) -> None:
        folder = self._out / name
        folder.mkdir(parents=True, exist_ok=True)
        command = part.command.format(out=shlex.quote(str(folder / "run")))
        began = time.monotonic()
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                shlex.split(command),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            try:
                status: int | str = process.wait(timeout=part.limit_s)
            except subprocess.TimeoutExpired:
                status = f"not done after {part.limit_s:g} s"
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
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
    waiting: queue.SimpleQueue[tuple[str, Part]] = queue.SimpleQueue()
    for name in names:
        waiting.put((name, known[name]))
    args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.out.resolve(), time.monotonic() + args.budget)
    workers = [threading.Thread(target=runner.work, args=(gpu, waiting)) for gpu in args.gpus.split(",")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if runner.passed_over:
        print(f"no time for: --parts {','.join(runner.passed_over)}")


if __name__ == "__main__":
    main()
