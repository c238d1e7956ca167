"""Nothing of a trial outlives it, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megafold_bench.launchers import LocalLauncher, oom_kills, package_environment
from megafold_bench.sweep import plan
from megafold_bench.trials import WorkerRequest, utc_now


def processes_with(mark: str) -> list[int]:
    """Processes whose environment holds `mark`. Zombies have none."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def wait_until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def request_for(tmp_path, fakes, spec):
    def make(ending: str) -> WorkerRequest:
        trial = plan(spec(options={"ending": ending}))[0]
        return WorkerRequest(
            trial, "r", 1, tmp_path / "record.json", tmp_path / "log", utc_now(), time.monotonic()
        )

    return make


@pytest.fixture
def mark(tmp_path) -> str:
    return f"MEGAFOLD_TEST_MARK={tmp_path}"


@pytest.fixture
def launcher(tmp_path, fakes) -> LocalLauncher:
    return LocalLauncher(grace_s=0.4, environment={**os.environ, "MEGAFOLD_TEST_MARK": str(tmp_path)})


def test_timed_out_family_is_gone(request_for, launcher, listener, mark):
    """The worker and one child ignore SIGTERM; another child has left the process group."""
    launched = launcher.run(request_for("hang_family"), 0.8, listener)
    assert launched.ending.timed_out
    assert launched.wall_s < 5
    assert processes_with(mark) == []


def test_events_arrive_in_order(request_for, launcher, listener):
    launched = launcher.run(request_for("ok"), 20, listener)
    names = [(event["event"], event.get("index")) for event in listener.events]
    assert names == [("built", None), *(("step", i) for i in range(7))]
    assert launched.steps_done == 7
    assert launched.child_maxrss_bytes is not None and launched.child_maxrss_bytes > 1 << 20


def test_killed_guard_takes_the_worker_along(request_for, launcher, listener, mark):
    class KillTheGuard(type(listener)):
        def on_event(self, event):
            if event["event"] == "built":
                worker_and_guard = processes_with(mark)
                parents = {
                    pid: int(Path(f"/proc/{pid}/stat").read_text().split()[3]) for pid in worker_and_guard
                }
                (guard,) = [pid for pid in worker_and_guard if parents[pid] == os.getpid()]
                os.kill(guard, signal.SIGKILL)

    launched = launcher.run(request_for("hang"), 20, KillTheGuard())
    assert launched.ending.signal == signal.SIGKILL
    assert wait_until(lambda: processes_with(mark) == [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_parent_leaves_no_orphan(tmp_path, fakes, mark, number):
    code = """
import sys, time
from pathlib import Path
from megafold_bench.launchers import LocalLauncher
from megafold_bench.sweep import SweepSpec, plan
from megafold_bench.trials import WorkerRequest, utc_now
class Tell:
    def on_event(self, event): print(event["event"], event.get("index"), flush=True)
    def on_tick(self): pass
out = Path(sys.argv[1])
trial = plan(SweepSpec(("fake",), (32,), "cpu", {"ending": "hang_family"}))[0]
request = WorkerRequest(trial, "r", 1, out / "record", out / "log", utc_now(), time.monotonic())
LocalLauncher().run(request, 60, Tell())
"""
    environment = {**package_environment(os.environ), "MEGAFOLD_TEST_MARK": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    assert "step 1\n" in iter(parent.stdout.readline, "")
    assert wait_until(lambda: len(processes_with(mark)) == 5)  # parent, guard, worker, its two children
    parent.send_signal(number)
    assert parent.wait(timeout=5) == -number
    assert wait_until(lambda: processes_with(mark) == [])


def test_parent_sleeps_while_the_worker_runs(request_for, launcher, listener):
    before = time.process_time()
    launched = launcher.run(request_for("hang"), 1.0, listener)
    assert launched.ending.timed_out
    assert time.process_time() - before < 0.1


def test_user_error_in_the_worker_is_passed_on(request_for, launcher, listener):
    launched = launcher.run(request_for("user_error"), 20, listener)
    assert launched.user_error is not None and "12 tokens" in launched.user_error


def test_record_that_cannot_be_written_is_reported(request_for, launcher, listener, tmp_path):
    (tmp_path / "record.json").mkdir()
    launched = launcher.run(request_for("ok"), 20, listener)
    assert launched.io_error is not None and "record.json" in launched.io_error


def test_worker_that_cannot_start(request_for, listener):
    launched = LocalLauncher(interpreter=("/bin/false",)).run(request_for("ok"), 20, listener)
    assert launched.ending.exit_code == 1


def test_ticks(request_for, fakes, listener):
    ticks = []

    class Ticking(type(listener)):
        def on_tick(self):
            ticks.append(1)

    LocalLauncher(tick_s=0.05, grace_s=0.4).run(request_for("hang"), 0.6, Ticking())
    assert 3 <= len(ticks) <= 15


def test_oom_kills_without_any_cgroup(tmp_path):
    assert oom_kills(tmp_path) == 0
