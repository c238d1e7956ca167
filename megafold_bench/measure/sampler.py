"""A device sampler in a process of its own: low priority, asleep between samples, gone with its parent.

The parent holds `Sampler`; the child is ``python -m megafold_bench.measure.sampler`` and loads no torch.
The child sleeps in ``select`` on a pipe from the parent, so it wakes at once when the parent closes
it, exits or is killed. Memory is read every `interval_s`; power, energy, clocks, temperature,
utilisation and throttling every 100 ms, since their sensors are no faster; who holds the device every second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megafold_bench.devices import Device, Unavailable, open_selector, selector_for
from megafold_bench.measure.company import look
from megafold_bench.measure.samples import (
    SCHEMA,
    SLOW,
    DeviceSummary,
    SampleFile,
    read_samples,
    summarise_device,
)

SLOW_INTERVAL_S = 0.1
FLUSH_INTERVAL_S = 1.0
COMPANY_INTERVAL_S = 1.0
NICE = 10
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
READY = "ready"


@dataclass(frozen=True)
class SamplerCost:
    """What watching cost: the child's CPU time, as a share of one core, and its longest sample."""

    cpu_s: float
    wall_s: float
    cpu_fraction: float
    samples: int
    latency_max_s: float
    late_samples: int


@dataclass(frozen=True)
class SamplerResult:
    """What a sampler saw. `cost` is Unavailable if the child was killed before its last line."""

    path: Path
    interval_s: float
    devices: tuple[DeviceSummary, ...]
    cost: SamplerCost | Unavailable


class Sampler:
    """Watch devices while the ``with`` block runs.

    `selectors` are those of `megafold_bench.devices` (``cuda:0``, ``nvidia:GPU-…``, ``amd:…``, ``cpu``);
    ``cuda:i`` is resolved here, in the measured process. Raw samples go to `path`. The first sample, the memory
    baseline, is taken before ``__enter__`` returns: enter before the first CUDA call.

    Afterwards `result()` summarises everything, `result(start_ns, end_ns)` a window of
    ``time.monotonic_ns``. `dose` makes every kind of reading that many times as often as a sampler of `interval_s`
    does: what sampling costs shows sooner. Raises RuntimeError if the child does not start.
    """

    def __init__(self, selectors: Sequence[str], interval_s: float, path: Path, dose: int = 1) -> None:
        if not selectors:
            raise ValueError("a sampler needs at least one device")
        if dose < 1:
            raise ValueError(f"dose of {dose}: must be at least 1")
        if interval_s / dose < 0.001:
            raise ValueError(f"interval of {interval_s / dose} s: a sampler needs at least 1 ms")
        self._selectors = [_resolved(selector) for selector in selectors]
        self._interval_s = interval_s
        self._path = path
        self._dose = dose
        self._child: subprocess.Popen[str] | None = None
        self._file: SampleFile | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return None if self._child is None else self._child.pid

    def __enter__(self) -> Sampler:
        command = [sys.executable, "-m", "megafold_bench.measure.sampler", "--out", str(self._path)]
        command += ["--interval", repr(self._interval_s), "--dose", str(self._dose)]
        command += ["--parent", str(os.getpid()), *self._selectors]
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            self._await_ready(self._child)
        except BaseException:
            self._stop(kill=True)
            raise
        return self

    def _await_ready(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        readable, _, _ = select.select([child.stdout], [], [], START_TIMEOUT_S)
        line = child.stdout.readline().strip() if readable else ""
        if line != READY:
            message = self._stop()
            reason = message or f"no answer in {START_TIMEOUT_S:.0f} s"
            raise RuntimeError(f"the device sampler did not start: {reason}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self, kill: bool = False) -> str:
        """Tell the child to stop, wait for it to write its last line, and give back what it complained of."""
        if self._child is None:
            return ""
        child, self._child = self._child, None
        if kill:
            child.kill()
        try:
            _, complaint = child.communicate("stop\n", timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            _, complaint = child.communicate()
        lines = complaint.strip().splitlines()
        return lines[-1] if lines else ""

    def result(self, start_ns: int | None = None, end_ns: int | None = None) -> SamplerResult:
        """Summaries over the whole time or a window of it. Call after the ``with`` block."""
        if self._child is not None:
            raise RuntimeError("the sampler is still running: leave its with block first")
        if self._file is None:
            self._file = read_samples(self._path)
        file = self._file
        summaries = tuple(summarise_device(device, start_ns, end_ns) for device in file.devices)
        cost: SamplerCost | Unavailable = Unavailable("the sampler was killed before it wrote its cost")
        if file.footer is not None:
            cost = SamplerCost(**file.footer)
        return SamplerResult(self._path, self._interval_s / self._dose, summaries, cost)


def _resolved(selector: str) -> str:
    kind, _, rest = selector.partition(":")
    if kind != "cuda":
        return selector
    found = selector_for("cuda", int(rest or 0))
    # Left as it is, the child gives this same reason for every reading.
    return selector if isinstance(found, Unavailable) else found


class _Recorder:
    """The child's work: read devices, write lines."""

    def __init__(self, devices: Sequence[Device], out: TextIO) -> None:
        self._devices = devices
        self._out = out
        self.samples = 0
        self.latency_max_ns = 0

    def _slow(self, device: Device) -> list[Any]:
        readings = [getattr(device, name)() for name in SLOW]
        return [None if isinstance(reading, Unavailable) else reading for reading in readings]

    def probe(self) -> list[dict[str, str]]:
        """Each device's missing columns and why, from one reading of everything."""
        found = []
        for device in self._devices:
            reasons = {}
            for name in ("memory", "processes", *SLOW):
                reading = getattr(device, name)()
                if isinstance(reading, Unavailable):
                    reasons["used_bytes" if name == "memory" else name] = reading.reason
            found.append(reasons)
        return found

    def look(self) -> None:
        """Note who holds each device that can tell."""
        for index, device in enumerate(self._devices):
            processes = device.processes()
            if isinstance(processes, Unavailable):
                continue
            company = look(processes)
            row = {"device": index, "time_ns": time.monotonic_ns(), **vars(company)}
            self._out.write(json.dumps(row, separators=(",", ":")) + "\n")

    def take(self, slow: bool) -> None:
        """One sample of every device. Its time is the middle of the memory reading."""
        for index, device in enumerate(self._devices):
            begin = time.monotonic_ns()
            memory = device.memory()
            middle = (begin + time.monotonic_ns()) // 2
            extra = self._slow(device) if slow else []
            latency = time.monotonic_ns() - begin
            used = None if isinstance(memory, Unavailable) else memory.used_bytes
            self._out.write(json.dumps([index, middle, latency, used, *extra], separators=(",", ":")) + "\n")
            self.samples += 1
            self.latency_max_ns = max(self.latency_max_ns, latency)


def _record(recorder: _Recorder, out: TextIO, interval_s: float, dose: int, parent: int) -> int:
    """Sample on a fixed grid until the pipe closes or the parent is gone; returns how many ticks were missed."""
    stdin = sys.stdin.fileno()
    interval_s, slow_s, company_s = interval_s / dose, SLOW_INTERVAL_S / dose, COMPANY_INTERVAL_S / dose
    now = next_fast = next_slow = next_flush = time.monotonic()
    next_look = now + company_s
    missed = 0
    while True:
        slow = now >= next_slow
        recorder.take(slow)
        if slow:
            next_slow += slow_s * (1 + int((now - next_slow) / slow_s))
        if now >= next_look:
            recorder.look()
            next_look = now + company_s
        if now >= next_flush:
            out.flush()
            next_flush = now + FLUSH_INTERVAL_S
        after = time.monotonic()
        behind = int(max(after - next_fast, 0.0) / interval_s)
        missed += behind
        next_fast += interval_s * (1 + behind)
        readable, _, _ = select.select([stdin], [], [], max(next_fast - after, 0.0))
        # A process forked by the parent may hold the pipe open, so that neither its closing nor the
        # parent's death shows here: hence a word to stop, and a look at who the parent is.
        if readable or os.getppid() != parent:
            recorder.take(True)
            recorder.look()
            return missed
        now = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """The child."""
    parser = argparse.ArgumentParser(prog="megafold_bench.measure.sampler")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interval", type=float, required=True)
    parser.add_argument("--dose", type=int, default=1)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("selectors", nargs="+")
    options = parser.parse_args(arguments)
    # Ctrl-C goes to the whole group; the parent decides when watching ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    devices = [open_selector(selector) for selector in options.selectors]
    with options.out.open("w", encoding="utf-8") as out:
        recorder = _Recorder(devices, out)
        header = {
            "schema": SCHEMA,
            "interval_s": options.interval / options.dose,
            "slow_interval_s": SLOW_INTERVAL_S / options.dose,
            "selectors": options.selectors,
            "columns": ["device", "time_ns", "latency_ns", "used_bytes", *SLOW],
            "unavailable": recorder.probe(),
            "wall_anchor_s": time.time(),
            "monotonic_anchor_ns": time.monotonic_ns(),
        }
        out.write(json.dumps(header, separators=(",", ":")) + "\n")
        recorder.take(True)
        recorder.look()
        out.flush()
        print(READY, flush=True)
        before, begin = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        missed = _record(recorder, out, options.interval, options.dose, options.parent)
        after, wall = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - begin
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cost = SamplerCost(cpu, wall, cpu / wall, recorder.samples, recorder.latency_max_ns * 1e-9, missed)
        out.write(json.dumps(vars(cost), separators=(",", ":")) + "\n")
    for device in devices:
        device.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
