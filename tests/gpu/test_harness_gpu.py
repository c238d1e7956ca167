"""Times, memory, capacity and telemetry of a torch workload on a real GPU, through real workers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megafold_bench.boundary import BoundarySpec, find_boundaries
from megafold_bench.launchers import LocalLauncher
from megafold_bench.points import Phase
from megafold_bench.runs import RunFolder
from megafold_bench.sweep import Runner, SweepSpec, plan

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

FAKES = Path(__file__).resolve().parent.parent / "fakes"
PAIR_BYTES = 4096
MIB = 1 << 20


class Quiet:
    def on_trial(self, trial: Any, number: int, of: int) -> None: ...

    def on_event(self, event: Any) -> None: ...

    def on_tick(self) -> None: ...

    def on_record(self, record: Any) -> None: ...


@pytest.fixture
def spec(monkeypatch) -> SweepSpec:
    monkeypatch.syspath_prepend(str(FAKES))
    root = str(FAKES.parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), root, os.environ.get("PYTHONPATH", "")]))
    conf = "expandable_segments:True" if torch.version.cuda else None
    return SweepSpec(
        ("fake-torch",), (512,), "cuda", steps=20, warmup=3, repeats=1, timeout_s=120, alloc_conf=conf
    )


@pytest.fixture
def runner(spec, tmp_path):
    with RunFolder.open(
        tmp_path / "run", kind="sweep", spec=spec.as_dict(), environment=dict, resume=False
    ) as folder:
        yield Runner(folder, LocalLauncher(), Quiet(), 120, sample_interval_s=0.02)


def test_time_record(spec, runner):
    record = runner.run(next(t for t in plan(spec) if t.point.phase is Phase.TIME), 1, 1)
    assert record["outcome"]["status"] == "ok", record["outcome"]
    times = record["time"]
    assert 0 < times["gpu_step_time_s"]["median"] <= times["step_time_s"]["median"]
    assert 0 < times["enqueue_s"]["median"] <= times["step_time_s"]["median"]
    assert 0 < times["h2d_s"]["median"] < times["step_time_s"]["median"]
    assert len(times["samples"]["gpu_step_time_s"]) == 20
    assert record["provenance"]["device_name"]
    assert record["telemetry"]["device_used_peak_bytes"] > record["telemetry"]["device_used_baseline_bytes"]


def test_memory_record(spec, runner):
    record = runner.run(next(t for t in plan(spec) if t.point.phase is Phase.MEMORY), 1, 1)
    assert record["outcome"]["status"] == "ok", record["outcome"]
    memory = record["memory"]
    pair = 512**2 * PAIR_BYTES
    assert (
        pair <= memory["allocated_peak_bytes"] <= pair + 128 * MIB
    )  # the matrix library's workspace: 70 MiB on an H200
    assert memory["requested_peak_bytes"] <= memory["allocated_peak_bytes"] <= memory["reserved_peak_bytes"]
    explained = memory["reserved_peak_bytes"] + memory["non_torch_bytes"]
    assert memory["device_used_peak_bytes"] == pytest.approx(explained, rel=0.02, abs=64 * MIB)
    assert memory["peak_step"] is not None
    assert memory["alloc_retries"] == 0


def test_boundary_at_an_emulated_capacity(spec, tmp_path):
    """4 GiB less the overhead hold one pair array of up to about 900² × 4096 bytes."""
    capacity = 4 << 30
    asked = BoundarySpec(spec, 64, (capacity,), start=512, longest=4096, confirm=1)
    with RunFolder.open(
        tmp_path / "run", kind="boundary", spec=asked.as_dict(), environment=dict, resume=False
    ) as folder:
        (found,) = find_boundaries(asked, Runner(folder, LocalLauncher(), Quiet(), 120))
        passed = [r for r in folder.records if r["outcome"]["status"].startswith("ok")]
        failed = [r for r in folder.records if r["outcome"]["status"] == "oom_device"]
    assert found.max_ok is not None and found.min_fail == found.max_ok + 64
    assert found.min_fail**2 * PAIR_BYTES < capacity + 512 * MIB
    assert (found.min_fail + 64) ** 2 * PAIR_BYTES > capacity - 1024 * MIB
    for record in passed:
        overhead = record["provenance"]["capacity_overhead_bytes"]
        assert record["memory"]["reserved_peak_bytes"] + overhead <= capacity
    assert failed and all(r["outcome"]["oom"]["tried_bytes"] for r in failed)


def test_full_device_is_named(spec, runner):
    from dataclasses import replace

    trial = plan(replace(spec, seq_lens=(20000,)))[0]
    record = runner.run(trial, 1, 1)
    assert record["outcome"]["status"] == "oom_device"
    assert record["outcome"]["failing_step"] == 0


def test_snapshot_of_a_full_device_names_the_line_that_holds_it(spec, tmp_path):
    from dataclasses import replace

    full = replace(spec, seq_lens=(20000,))
    with RunFolder.open(
        tmp_path / "run", kind="sweep", spec=full.as_dict(), environment=dict, resume=False
    ) as folder:
        runner = Runner(folder, LocalLauncher(), Quiet(), 120, snapshot=True)
        record = runner.run(next(t for t in plan(full) if t.point.phase is Phase.MEMORY), 1, 1)
    kept = json.loads((tmp_path / "run" / record["outcome"]["snapshot"]).read_text())
    assert kept["wanted_bytes"] >= 20000**2 * PAIR_BYTES
    assert 0 < kept["allocated_bytes"] <= kept["reserved_bytes"]
    assert any("fake_torch.py" in line for holder in kept["holders"] for line in holder["stack"])


@pytest.mark.parametrize("sampled", [True, False])
def test_the_trial_itself_is_no_foreign_process(spec, tmp_path, sampled):
    """Seen for several seconds, so that the sampler looks more than twice."""
    from dataclasses import replace

    long = replace(spec, steps=400, seq_lens=(2048,))
    with RunFolder.open(
        tmp_path / "run", kind="sweep", spec=long.as_dict(), environment=dict, resume=False
    ) as folder:
        runner = Runner(folder, LocalLauncher(), Quiet(), 120, sample_interval_s=0.05 if sampled else None)
        record = runner.run(plan(long)[0], 1, 1)
    assert record["outcome"]["status"] == "ok", record["outcome"]
    assert "foreign_process" not in record["quality"]
    if sampled:
        assert record["telemetry"]["foreign_processes"] == 0
