"""One trial in one fresh process: build, measure, leave one record, end.

Started by a launcher as ``python -m megafold_bench.worker --events-fd FD`` with the request on the
first line of standard input. PyTorch is imported by the variant, never by this module on a CPU.
Exit codes: 0 a record was left, 2 the user's input was at fault, 74 the record could not be written.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megafold_bench import guard, variants
from megafold_bench.devices.base import Unavailable
from megafold_bench.errors import UserError
from megafold_bench.measure import memory, snapshot, steps
from megafold_bench.outcomes import Outcome, UnsupportedError, Verdict, classify
from megafold_bench.points import Phase, Point
from megafold_bench.records import Record
from megafold_bench.runs import encode, write_atomically
from megafold_bench.trials import WorkerRequest, blank_record, utc_now, verdict_fields
from megafold_bench.variants import Workload

EXIT_USER_ERROR = 2
EXIT_IO_ERROR = 74

Emit = Callable[..., None]


def read_request() -> WorkerRequest:
    """The request from standard input, read no further than its line: the guard watches the rest."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            sys.exit("the sweep went away before it sent a request")
        line += part
    return WorkerRequest.from_json(line.decode())


def provenance(point: Point) -> dict[str, Any]:
    """What this process is. PyTorch is described if the variant has loaded it."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "pid": os.getpid(),
        "gc_policy": steps.GC_POLICY,
        "alloc_conf": memory.allocator_setting(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    with contextlib.suppress(AttributeError):
        facts["cpu_affinity"] = sorted(os.sched_getaffinity(0))
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch"] = torch.__version__
        facts["torch_git"] = torch.version.git_version
        facts["cuda"] = torch.version.cuda
        facts["hip"] = torch.version.hip
        facts["torch_threads"] = torch.get_num_threads()
        if point.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            facts["device_name"] = properties.name
            facts["device_uuid"] = str(getattr(properties, "uuid", "")) or None
            facts["device_total_bytes"] = properties.total_memory
            facts["tf32_matmul"] = torch.backends.cuda.matmul.allow_tf32
    triton = sys.modules.get("triton")
    if triton is not None:
        facts["triton"] = triton.__version__
    return facts


def build(point: Point) -> Workload:
    """The variant's training session. Raises `UnsupportedError` with the variant's reason."""
    variant = variants.get(point.variant)
    support = variant.support(point.device)
    if not support.usable:
        raise UnsupportedError(support.reason)
    return variant.build(dict(point.workload), point.seq_len, point.seed, point.device)


class TrialRun:
    """The course of one trial. What has been measured survives an exception."""

    def __init__(self, request: WorkerRequest, emit: Emit) -> None:
        self.point = request.trial.point
        self.record = blank_record(request, Verdict(Outcome.OK))
        self.record["provenance"]["startup_s"] = time.monotonic() - request.started_monotonic_s
        self._request = request
        self._emit = emit
        self._log = steps.StepLog()
        self._build_s = 0.0
        self._meters: list[memory.MemoryMeter] = []
        self._watch: snapshot.OomWatch | Unavailable | None = None

    def measure(self) -> None:
        """Build the workload and run the phase's steps. Raises whatever ends the trial."""
        point = self.point
        with Telemetry(self._request, self.record) as self._telemetry:
            self._prepare()
            began = time.perf_counter()
            workload = build(point)
            timer = steps.timer_for(point.device)
            timer.synchronise()
            self._build_s = time.perf_counter() - began
            self.record["facts"] = dict(workload.facts)
            self._emit("built", seconds=self._build_s)
            steps.run_steps(workload, timer, point.warmup + point.steps, self._log, self._after_step)

    def _prepare(self) -> None:
        point = self.point
        if point.alloc_conf is not None:
            os.environ["PYTORCH_ALLOC_CONF"] = point.alloc_conf
        if point.phase is Phase.MEMORY:
            self._meters = memory.meters_for(point.device)
            for meter in self._meters:
                meter.reset()
            if self._request.snapshot:
                self._watch = snapshot.watch_for(point.device)
                if isinstance(self._watch, snapshot.OomWatch):
                    self._watch.start()
        if point.capacity_emulated_bytes is not None:
            import torch

            overhead = memory.emulate_capacity(torch.cuda, point.capacity_emulated_bytes)
            self.record["provenance"]["capacity_overhead_bytes"] = overhead

    def _after_step(self, index: int) -> None:
        for meter in self._meters:
            meter.after_step(index)
        if index + 1 == self.point.warmup:
            self._telemetry.steady()
        self._emit("step", index=index, of=self.point.warmup + self.point.steps)

    def fail(self, error: BaseException) -> None:
        """Record how the trial ended."""
        self.record["outcome"].update(verdict_fields(classify(error)))  # type: ignore[typeddict-item]
        self.record["outcome"]["failing_rank"] = 0
        done = len(self._log.losses)
        # A step whose loss is not finite did finish; any other failing step left nothing in the log.
        self.record["outcome"]["failing_step"] = (
            done - 1 if is_nan(self.record) else done if self._build_s else None
        )
        if self._watch is not None and self.record["outcome"]["status"] == Outcome.OOM_DEVICE:
            self._keep_snapshot(self._watch)

    def _keep_snapshot(self, watch: snapshot.OomWatch | Unavailable) -> None:
        written = watch.write(self._request.snapshot_path) if isinstance(watch, snapshot.OomWatch) else watch
        if isinstance(written, Unavailable):
            self.record["unavailable"]["outcome.snapshot"] = written.reason
        else:
            self.record["outcome"]["snapshot"] = written

    def complete(self) -> Record:
        """The record with everything that was measured."""
        record = self.record
        record["provenance"] |= provenance(self.point)
        record["losses"] = list(self._log.losses)
        if self.point.phase is Phase.TIME and self._log.losses:
            steps.add_time(record, self._log, self._build_s)
        if self._meters:
            with self._even_after_a_device_error():
                memory.add_memory(record, self._meters, len(self._log.losses))
                memory.add_sampled(record)
        retries = (record["memory"] or {}).get("alloc_retries")
        if retries and record["outcome"]["status"] == Outcome.OK:
            record["outcome"]["status"] = Outcome.OK_PRESSURE.value
            record["outcome"]["status_detail"] = f"the allocator had to free its cache {retries} times"
        record["ended_at"] = utc_now()
        record["wall_s"] = time.monotonic() - self._request.started_monotonic_s
        return record

    @contextlib.contextmanager
    def _even_after_a_device_error(self) -> Iterator[None]:
        """A device whose context is lost gives no readings; that is no reason to lose the record."""
        try:
            yield
        except RuntimeError as error:
            if self.record["outcome"]["status"] == Outcome.OK:
                raise
            self.record["unavailable"]["memory"] = f"not readable after the failure: {error}"


def is_nan(record: Record) -> bool:
    """Whether the trial ended at a loss that is not finite."""
    return record["outcome"]["status"] == Outcome.NAN


class Telemetry:
    """The device sampler beside one trial, in a process of its own. Its failure is not the trial's."""

    def __init__(self, request: WorkerRequest, record: Record) -> None:
        self._request = request
        self._record = record
        self._sampler: Any = None
        self._steady_from_ns: int | None = None

    def __enter__(self) -> Telemetry:
        if self._request.sample_interval_s is None:
            self._record["unavailable"]["telemetry"] = "sampling was switched off"
            return self
        from megafold_bench.measure.sampler import Sampler

        device = self._request.trial.point.device
        selector = device if device == "cpu" else f"{device}:0"
        path = self._request.samples_path
        try:
            path.parent.mkdir(exist_ok=True)
            self._sampler = Sampler([selector], self._request.sample_interval_s, path).__enter__()
        except (OSError, RuntimeError) as error:
            self._record["unavailable"]["telemetry"] = str(error)
        return self

    def steady(self) -> None:
        """The warm-up is over: power, clocks and energy are summarised from here on."""
        self._steady_from_ns = time.monotonic_ns()

    def __exit__(self, *error: Any) -> None:
        if self._sampler is None:
            return
        ended_ns = time.monotonic_ns()
        self._sampler.__exit__(*error)
        try:
            whole = self._sampler.result()
            window = self._sampler.result(self._steady_from_ns, ended_ns)
        except (OSError, UserError, ValueError) as failure:
            self._record["unavailable"]["telemetry"] = f"the sampler's file cannot be read: {failure}"
            return
        telemetry = window.devices[0].as_record()
        # Memory is a peak over the whole trial, everything else a mean over the steady steps.
        telemetry |= {
            name: value
            for name, value in whole.devices[0].as_record().items()
            if name.startswith("device_used")
        }
        cost = vars(window.cost) if window.cost else {"unavailable": window.cost.reason}
        self._record["telemetry"] = {
            **telemetry,
            "sample_interval_s": self._request.sample_interval_s,
            "cost": cost,
        }


def run(request: WorkerRequest, emit: Emit) -> int:
    """Run the trial and leave its record. Returns the exit code."""
    trial = TrialRun(request, emit)
    try:
        trial.measure()
    except UserError as error:
        emit("user_error", must_arrive=True, message=str(error))
        return EXIT_USER_ERROR
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        trial.fail(error)
        # The traceback's frames hold the tensors that filled the memory; the record needs a little of it.
        traceback.clear_frames(error.__traceback__)
    record = trial.complete()
    try:
        write_atomically(request.record_path, encode(record))
    except OSError as error:
        emit(
            "io_error",
            must_arrive=True,
            message=f"{request.record_path}: {error.strerror}",
            errno=error.errno,
        )
        return EXIT_IO_ERROR
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the worker process. Does not return."""
    parser = argparse.ArgumentParser(prog="megafold_bench.worker", description=__doc__)
    parser.add_argument("--events-fd", type=int, required=True)
    events_fd: int = parser.parse_args(arguments).events_fd
    request = read_request()
    guard.split(events_fd)
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)  # a trial that is stopped says where it was

    def emit(event: str, **values: Any) -> None:
        guard.send_event(events_fd, event, **values)

    code = run(request, emit)
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter shutdown: with the record on disk, a device library that hangs in its own
    # clean-up must not hold up the sweep. The guard ends whatever this process has started.
    os._exit(code)


if __name__ == "__main__":
    main()
