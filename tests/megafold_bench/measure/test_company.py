"""Who else was on the device: from fake vendor libraries through the sampler to the record's flags."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megafold_bench.devices.base import DeviceProcess, Unavailable
from megafold_bench.finish import finish
from megafold_bench.measure.company import Company, foreign_processes, found_company, look
from megafold_bench.measure.sampler import Sampler
from megafold_bench.measure.samples import read_samples, summarise_device
from megafold_bench.outcomes import Outcome, Verdict
from megafold_bench.points import Phase, Trial
from megafold_bench.sweep import make_point
from megafold_bench.trials import WorkerRequest, blank_record, utc_now

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[3]
HOST = 4_194_000  # beyond any process id here


def looks(*others, ours=False):
    return [Company(ours, tuple(pids)) for pids in others]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (looks([], [], [], ours=True), 0),
        (looks([7], [7], [7], ours=True), 1),
        (looks([], [7], [7], ours=True), 1),
        (looks([7], [], [], ours=True), 0),  # on its way out
        (looks([], [7], [], [8], ours=True), 0),  # came and went
        (looks([], [7], [7, 8], [7, 8]), 1),  # a container: one of the newcomers is the trial
        (looks([], [7], [7]), 0),
        (looks([6], [6, 7], [6, 7]), 1),
        (looks([6], [6], [6]), 1),  # the trial never shows
    ],
)
def test_counting(seen, expected):
    assert foreign_processes(seen) == expected


def test_nothing_seen_is_unavailable():
    assert foreign_processes([]) == Unavailable("processes: no sample of them")


def test_own_session_and_monitors_are_no_company():
    rows = [
        DeviceProcess(os.getpid(), 5 * GIB),
        DeviceProcess(HOST, 0),  # a monitor holds no memory
        DeviceProcess(HOST + 1, Unavailable("the library gave None")),
    ]
    assert look(rows) == Company(True, (HOST + 1,))
    assert look(rows[:2]) == Company(True, ())


def test_memory_in_use_before_the_trial_is_company():
    assert found_company(0, "cuda", 2 * GIB) and found_company(2, "cuda", 0)
    assert not found_company(None, "cuda", 300 << 20)
    assert not found_company(0, "cpu", 40 * GIB)


FAKE_NVML = """
from types import SimpleNamespace
from tests.megafold_bench.devices.conftest import UUIDS, Gpu, build_nvml
gpu = Gpu(UUIDS[0])
gpu.processes = [SimpleNamespace(pid=pid, usedGpuMemory=1 << 30) for pid in {pids}]
gpu.memory.used = {used}
gpu.reasons = {reasons}
globals().update(vars(build_nvml([gpu])))
"""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Run a real sampler process over a fake NVML; gives the telemetry of a record."""

    def run(pids, reasons=0, used=1 << 20):
        folder = tmp_path / "vendor"
        folder.mkdir()
        (folder / "pynvml.py").write_text(FAKE_NVML.format(pids=pids, reasons=reasons, used=used))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        uuid = "GPU-11111111-aaaa-4000-8000-000000000001"
        with Sampler([f"nvidia:{uuid}"], 0.05, tmp_path / "s.jsonl") as sampler:
            time.sleep(0.3)
        return sampler.result().devices[0].as_record()

    return run


def record_with(spec, telemetry, phase=Phase.TIME):
    point = make_point(spec(), "fake", 32, phase)
    request = WorkerRequest(Trial(point, 0), "run", 1, Path("r"), Path("l"), utc_now(), 0.0)
    record = blank_record(request, Verdict(Outcome.OK))
    record["factors"] = {**record["factors"], "device": "cuda"}
    record["telemetry"] = telemetry
    if phase is Phase.TIME:
        steps = [1.0 + 0.001 * (i % 3) for i in range(12)]
        record["time"] = {
            "samples": {"step_time_s": steps}, "warmup_samples": {"step_time_s": [2.0]}, "warmup_steps": 1,
        }  # fmt: skip
    return finish(record)


def test_foreign_process_and_throttling_reach_the_record(watch, fakes, spec):
    telemetry = watch([os.getpid(), HOST], reasons=0x4)
    assert telemetry["foreign_processes"] == 1
    assert telemetry["throttle_fraction"] == 1.0
    assert record_with(spec, telemetry)["quality"] == ["throttled", "foreign_process"]
    # Low clocks do not change how much memory is needed.
    assert record_with(spec, telemetry, Phase.MEMORY)["quality"] == ["foreign_process"]


def test_a_device_of_ones_own_leaves_no_flag(watch, fakes, spec):
    telemetry = watch([os.getpid()], reasons=0x1)
    assert telemetry["foreign_processes"] == 0
    assert record_with(spec, telemetry)["quality"] == []


def test_a_full_device_with_an_empty_list_is_flagged(watch, fakes, spec):
    telemetry = watch([], used=30 * GIB)
    assert telemetry["foreign_processes"] == 0
    assert record_with(spec, telemetry)["quality"] == ["foreign_process"]


def test_without_a_list_the_reason_is_kept(tmp_path):
    with Sampler(["cpu"], 0.05, tmp_path / "s.jsonl") as sampler:
        pass
    telemetry = sampler.result().devices[0].as_record()
    assert telemetry["foreign_processes"] is None
    assert telemetry["unavailable"]["foreign_processes"] == "processes: every process runs on the CPU"


def test_files_from_before_processes_were_noted_are_read(tmp_path):
    path = tmp_path / "s.jsonl"
    header = {"schema": 1, "interval_s": 0.05, "selectors": ["nvidia:GPU-x"], "unavailable": [{}],
              "wall_anchor_s": 1.0, "monotonic_anchor_ns": 0}  # fmt: skip
    path.write_text(json.dumps(header) + "\n[0,1,1,5]\n")
    summary = summarise_device(read_samples(path).devices[0])
    assert summary.foreign_processes == Unavailable("processes: no sample in the window")
