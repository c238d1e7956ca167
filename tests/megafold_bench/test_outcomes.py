"""Every outcome is caused, in a real worker process wherever that can be done without a GPU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megafold_bench.outcomes import Ending, Outcome, classify, complete, parse_oom, signal_name

RAISED_OR_DIED = [
    ("ok", "ok", None),
    ("oom_device", "oom_device", "fake_variants.OutOfMemoryError"),
    ("oom_cublas", "oom_device_lib", "builtins.RuntimeError"),
    ("oom_accelerator", "oom_device_lib", "fake_variants.AcceleratorError"),
    ("oom_nccl", "oom_device_lib", "fake_variants.DistBackendError"),
    ("oom_host", "oom_host", "builtins.MemoryError"),
    ("oom_host_torch", "oom_host", "builtins.RuntimeError"),
    ("bad_alloc", "oom_host", None),
    ("kernel_resource", "kernel_resource", "fake_variants.OutOfResources"),
    ("index_overflow", "index_overflow", "builtins.RuntimeError"),
    ("launch_fail", "launch_fail", "fake_variants.AcceleratorError"),
    ("error", "error", "builtins.KeyError"),
    ("exit", "error", "builtins.SystemExit"),
    ("nan", "nan", "megafold_bench.outcomes.NonFiniteLossError"),
    ("abort", "crash", None),
    ("segv", "crash", None),
    ("kill", "crash", None),
    ("vanish", "crash", None),
]


@pytest.mark.parametrize(("ending", "status", "exception"), RAISED_OR_DIED)
def test_ending_is_recorded(run_one, open_run, ending, status, exception):
    record = run_one(ending)
    outcome = record["outcome"]
    assert outcome["status"] == status
    assert outcome["exception_type"] == exception
    assert outcome["failing_step"] == (None if status == "ok" else 2)
    assert (outcome["log_tail"] is None) or status != "ok"
    assert record["wall_s"] > 0


def test_device_oom_keeps_the_numbers_of_its_message(run_one):
    oom = run_one("oom_device")["outcome"]["oom"]
    assert oom == {
        "tried_bytes": 2 << 30,
        "free_bytes": round(1.5 * 2**30),
        "allocated_bytes": round(130.25 * 2**30),
        "reserved_unallocated_bytes": round(6.5 * 2**30),
    }


def test_signals_and_stack_are_recorded(run_one):
    outcome = run_one("segv")["outcome"]
    assert (outcome["signal"], outcome["exit_code"]) == ("SIGSEGV", None)
    assert "Segmentation fault" in outcome["log_tail"]
    assert "fake_variants.py" in outcome["log_tail"]


def test_samples_before_the_failure_are_kept(run_one):
    record = run_one("oom_device")
    assert record["losses"] == [1.0, 0.5]
    assert len(record["time"]["warmup_samples"]["step_time_s"]) == 1
    assert len(record["time"]["samples"]["step_time_s"]) == 1


def test_nan_loss_is_null_in_the_record(run_one):
    assert run_one("nan")["losses"] == [1.0, 0.5, None]


def test_hang(run_one):
    outcome = run_one("hang", timeout_s=0.7)["outcome"]
    assert outcome["status"] == "hang"
    assert "time.sleep" in outcome["log_tail"] or "provoke" in outcome["log_tail"]


def test_timeout_while_building(run_one):
    outcome = run_one("slow_build", timeout_s=0.5)["outcome"]
    assert outcome["status"] == "timeout"
    assert outcome["failing_step"] is None


def test_timeout_while_stepping(run_one):
    record = run_one("ok", timeout_s=1.0, step_ms=300.0)
    assert record["outcome"]["status"] == "timeout"
    assert record["outcome"]["failing_step"] >= 1


def test_unsupported_says_why(open_run, listener, spec):
    from megafold_bench.launchers import LocalLauncher
    from megafold_bench.sweep import Runner, plan

    asked = spec(device="cuda")
    trial = plan(asked)[0]
    record = Runner(open_run(asked), LocalLauncher(), listener, 20.0).run(trial, 1, 1)
    assert record["outcome"]["status"] == "unsupported"
    assert record["outcome"]["status_detail"] == "the fake runs on the CPU only"


def test_memory_pressure(monkeypatch, tmp_path, fakes, spec):
    """A worker whose allocator retried leaves ok_pressure and a quality flag."""
    from megafold_bench import worker
    from megafold_bench.finish import finish
    from megafold_bench.measure.memory import Peaks
    from megafold_bench.sweep import plan
    from megafold_bench.trials import WorkerRequest, utc_now

    class Retrying:
        def reset(self) -> None: ...

        def after_step(self, index: int) -> None: ...

        def read(self) -> Peaks:
            return Peaks({"alloc_retries": 3})

    monkeypatch.setattr(worker.memory, "meters_for", lambda device: [Retrying()])
    trial = next(t for t in plan(spec()) if t.point.phase == "memory")
    request = WorkerRequest(trial, "r", 1, tmp_path / "record", tmp_path / "log", utc_now(), 0.0)
    trial_run = worker.TrialRun(request, lambda event, **values: None)
    trial_run.measure()
    record = finish(trial_run.complete())
    assert record["outcome"]["status"] == "ok_pressure"
    assert "3 times" in record["outcome"]["status_detail"]
    assert record["quality"] == ["allocator_retries"]


V2 = "0::/trial\n"
V1 = "4:memory:/trial\n2:cpu:/\n"


@pytest.mark.parametrize(
    ("lines", "file"),
    [(V2, "sys/fs/cgroup/trial/memory.events"), (V1, "sys/fs/cgroup/memory/trial/memory.oom_control")],
)
def test_host_oom_kill_is_told_from_a_crash_by_the_cgroup(run_one, tmp_path, lines, file):
    """The fake worker raises the cgroup's count, as the kernel would, and is killed."""
    root = tmp_path / "root"
    counter = root / file
    counter.parent.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    counter.write_text("under_oom 0\noom 1\noom_kill 4\n")
    outcome = run_one("cgroup_kill", cgroup=root, touch=str(counter))["outcome"]
    assert outcome["status"] == "oom_host"
    assert outcome["signal"] == "SIGKILL"


def test_exit_code_137_with_a_cgroup_kill_is_host_memory():
    assert complete(Ending(exit_code=137, oom_kills=1)).outcome is Outcome.OOM_HOST
    assert complete(Ending(exit_code=137)).outcome is Outcome.CRASH


def test_sigkill_without_a_cgroup_kill_is_a_crash():
    assert complete(Ending(signal=signal.SIGKILL)).outcome is Outcome.CRASH


def test_real_torch_classes():
    torch = pytest.importorskip("torch")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    verdict = classify(error)
    assert verdict.outcome is Outcome.OOM_DEVICE
    assert verdict.oom is not None and verdict.oom["tried_bytes"] == 20 << 20
    accelerator = torch.AcceleratorError
    assert classify(accelerator("CUDA error: an illegal memory access")).outcome is Outcome.LAUNCH_FAIL
    assert classify(accelerator("CUDA error: out of memory")).outcome is Outcome.OOM_DEVICE_LIB
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert classify(caught.value).outcome is Outcome.OOM_HOST


def test_real_triton_class():
    errors = pytest.importorskip("triton.runtime.errors")
    error = errors.OutOfResources(300000, 232448, "shared memory")
    assert classify(error).outcome is Outcome.KERNEL_RESOURCE


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("CUDA error: too many resources requested for launch", Outcome.KERNEL_RESOURCE),
        ("nonzero is not supported for tensors with more than INT_MAX elements", Outcome.INDEX_OVERFLOW),
        ("HIP error: out of memory", Outcome.OOM_DEVICE_LIB),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", Outcome.OOM_DEVICE_LIB),
        ("CUDA error: device-side assert triggered", Outcome.LAUNCH_FAIL),
        ("mat1 and mat2 shapes cannot be multiplied", Outcome.ERROR),
    ],
)
def test_run_time_error_texts(text, outcome):
    assert classify(RuntimeError(text)).outcome is outcome


def test_a_wrapped_cause_decides():
    try:
        try:
            raise MemoryError
        except MemoryError as inner:
            raise ValueError("while building") from inner
    except ValueError as outer:
        assert classify(outer).outcome is Outcome.OOM_HOST


def test_a_key_error_that_mentions_memory_is_no_memory_error():
    assert classify(KeyError("out of memory")).outcome is Outcome.ERROR


def test_parse_oom_without_numbers():
    assert set(parse_oom("CUDA out of memory").values()) == {None}


def test_every_outcome_has_a_meaning():
    assert all(outcome.meaning for outcome in Outcome)
    assert signal_name(9) == "SIGKILL"
    assert signal_name(4000) == "signal 4000"


def test_logs_hold_the_traceback(run_one, tmp_path: Path):
    run_one("error")
    (log,) = (tmp_path / "run/logs").iterdir()
    assert "KeyError: 'pair'" in log.read_text()
