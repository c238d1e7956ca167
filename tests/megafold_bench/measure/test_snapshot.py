"""What held the memory as it ran out: summed up from PyTorch's form, kept once a point, named in the record."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megafold_bench import worker
from megafold_bench.devices.base import Unavailable
from megafold_bench.launchers import Launched
from megafold_bench.measure import snapshot
from megafold_bench.measure.snapshot import LARGEST, OomWatch, short_path, stack, summarise_segments
from megafold_bench.outcomes import Ending, Outcome, Verdict
from megafold_bench.points import Phase, Trial
from megafold_bench.runs import encode
from megafold_bench.sweep import Runner, make_point
from megafold_bench.trials import WorkerRequest, blank_record, utc_now

MIB = 1 << 20
SITE = "/somebody/lib/python3.12/site-packages"


def frame(name, line, function="forward"):
    return {"filename": name, "line": line, "name": function}


TRIANGLE = [
    frame(f"{SITE}/torch/nn/functional.py", 9, "linear"),
    frame(f"{SITE}/boltz/model/triangular.py", 57),
    frame(f"{SITE}/torch/utils/checkpoint.py", 3, "checkpoint"),
    frame("/home/somebody/train.py", 4, "<module>"),
]


def block(mib, state="active_allocated", frames=()):
    return {"size": mib * MIB, "requested_size": mib * MIB, "state": state, "frames": list(frames)}


def segment(*blocks, device=0):
    return {"device": device, "total_size": sum(b["size"] for b in blocks), "blocks": list(blocks)}


def test_everything_is_summed_up():
    found = summarise_segments(
        [
            segment(block(64, frames=TRIANGLE), block(64, frames=TRIANGLE), block(16, "inactive")),
            segment(block(32), block(8, "active_awaiting_free"), block(4, "inactive")),
        ]
    )
    assert found["segments"] == 2
    assert (
        found["reserved_bytes"]
        == 188 * MIB
        == sum(found[f"{part}_bytes"] for part in ("allocated", "waiting", "free"))
    )
    assert (found["allocated_bytes"], found["largest_free_bytes"]) == (160 * MIB, 16 * MIB)
    assert found["holders"] == [
        {
            "bytes": 128 * MIB,
            "blocks": 2,
            "stack": ["boltz/model/triangular.py:57 forward", "train.py:4 <module>"],
        },
        {"bytes": 32 * MIB, "blocks": 1, "stack": ["unknown"]},
    ]
    assert found["sizes"][0] == {"block_bytes": 64 * MIB, "blocks": 2, "bytes": 128 * MIB}


def test_it_stays_small_and_complete():
    segments = [segment(*(block(1 + i, frames=[frame("/x/a.py", i)]) for i in range(500)))]
    found = summarise_segments(segments)
    assert len(found["holders"]) == len(found["sizes"]) == LARGEST
    assert (
        sum(row["bytes"] for row in found["holders"]) + found["other_holders_bytes"]
        == found["allocated_bytes"]
    )
    assert (
        sum(row["bytes"] for row in found["sizes"]) + found["other_sizes_bytes"] == found["allocated_bytes"]
    )
    assert len(json.dumps(found)) < 10_000


def test_paths_say_nothing_of_the_machine():
    assert short_path(f"{SITE}/boltz/model/x.py") == "boltz/model/x.py"
    assert short_path("/home/somebody/secret/train.py") == "train.py"
    assert short_path(snapshot.__file__) == "megafold_bench/measure/snapshot.py"
    assert stack([frame(f"{SITE}/torch/x.py", 1)]) == ("unknown",)


class FakeCuda:
    """The part of ``torch.cuda`` that is used; `fail` is what the allocator does when it can give no more."""

    def __init__(self, segments=None):
        self.calls, self.observer = [], None
        self.memory = SimpleNamespace(
            _record_memory_history=lambda **options: self.calls.append(options),
            _snapshot=lambda: {"segments": segments},
        )

    def attach(self, observer):
        self.observer = observer

    def fail(self, wanted=2 << 30):
        self.observer(0, wanted, 141 << 30, 1 << 30)


def test_the_watch_keeps_the_last_failure_of_its_device(tmp_path):
    cuda = FakeCuda([segment(block(64, frames=TRIANGLE)), segment(block(999), device=1)])
    watch = OomWatch(cuda, cuda.attach)
    watch.start()
    assert cuda.calls == [{"enabled": "state", "context": "state", "stacks": "python"}]
    assert watch.write(tmp_path / "s.json") == Unavailable("no allocation failed")
    cuda.fail(1)
    cuda.fail()
    assert watch.write(tmp_path / "snapshots" / "s.json") == "snapshots/s.json"
    kept = json.loads((tmp_path / "snapshots" / "s.json").read_text())
    assert (kept["wanted_bytes"], kept["allocated_bytes"]) == (2 << 30, 64 * MIB)


def test_a_snapshot_that_fails_does_not_replace_the_error(tmp_path):
    cuda = FakeCuda(segments=None)
    watch = OomWatch(cuda, cuda.attach)
    watch.start()
    cuda.fail()
    assert "the snapshot failed: TypeError" in watch.write(tmp_path / "s.json").reason


@pytest.fixture
def request_for(fakes, spec, tmp_path):
    def make(ending, wanted=True):
        point = make_point(spec(options={"ending": ending, "bad_step": 1}), "fake", 32, Phase.MEMORY)
        (tmp_path / "run/pending").mkdir(parents=True)
        path = tmp_path / "run/pending/r.json"
        return WorkerRequest(
            Trial(point, 0), "run", 1, path, path, utc_now(), time.monotonic(), snapshot=wanted
        )

    return make


def worked(request):
    assert worker.run(request, lambda *_, **__: None) == 0
    return json.loads(request.record_path.read_text())


def test_the_worker_names_the_file_in_the_record(request_for, monkeypatch):
    cuda = FakeCuda([segment(block(64, frames=TRIANGLE))])
    monkeypatch.setattr(snapshot, "watch_for", lambda device: OomWatch(cuda, cuda.attach))
    classify = worker.classify
    monkeypatch.setattr(worker, "classify", lambda error: (cuda.fail(), classify(error))[1])
    request = request_for("oom_device")
    record = worked(request)
    assert record["outcome"]["status"] == "oom_device"
    name = record["outcome"]["snapshot"]
    assert name == f"snapshots/{record['trial_id']}.1.json"
    assert json.loads((request.record_path.parent.parent / name).read_text())["holders"]


def test_without_a_gpu_the_record_says_so(request_for):
    record = worked(request_for("oom_device"))
    assert "snapshot" not in record["outcome"]
    assert record["unavailable"]["outcome.snapshot"] == "memory snapshots are taken on GPUs only"


@pytest.mark.parametrize(("ending", "wanted"), [("oom_device", False), ("error", True), ("ok", True)])
def test_nothing_is_kept_where_it_was_not_asked_for_or_memory_did_not_run_out(request_for, ending, wanted):
    record = worked(request_for(ending, wanted))
    assert "snapshot" not in record["outcome"] and "outcome.snapshot" not in record["unavailable"]


def test_only_the_first_failure_of_a_point_is_kept(open_run, listener, spec):
    """The launcher here leaves what a worker would; repeats and time trials are not asked for a snapshot."""
    asked = []

    class Launcher:
        def run(self, request, timeout_s, watcher):
            asked.append((request.trial.point.phase, request.trial.repeat, request.snapshot))
            record = blank_record(request, Verdict(Outcome.OOM_DEVICE))
            if request.snapshot:
                record["outcome"]["snapshot"] = "snapshots/x.json"
            Path(request.record_path).write_bytes(encode(record))
            return Launched(Ending(exit_code=0), 0.1, 0, None, None, None)

    one = spec()
    runner = Runner(open_run(one), Launcher(), listener, 20.0, snapshot=True)
    memory = make_point(one, "fake", 32, Phase.MEMORY)
    for trial in (Trial(make_point(one, "fake", 32, Phase.TIME), 0), Trial(memory, 0), Trial(memory, 1)):
        runner.run(trial, 1, 1)
    assert asked == [(Phase.TIME, 0, False), (Phase.MEMORY, 0, True), (Phase.MEMORY, 1, False)]
