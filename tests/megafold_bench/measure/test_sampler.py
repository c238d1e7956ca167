"""The sampler's life and death, its file and its cost."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megafold_bench.devices.base import Unavailable
from megafold_bench.errors import UserError
from megafold_bench.measure.sampler import Sampler
from megafold_bench.measure.samples import read_samples, summarise_device

ROOT = Path(__file__).resolve().parents[3]


def _alive(pid):
    """Whether a process runs (a zombie that nobody waits for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _gone(pid, within_s=5.0):
    end = time.monotonic() + within_s
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not _alive(pid)


def test_samples_a_block(tmp_path):
    with Sampler(["cpu"], 0.02, tmp_path / "s.jsonl") as sampler:
        pid = sampler.pid
        begin = time.monotonic_ns()
        time.sleep(0.5)
        end = time.monotonic_ns()
    assert _gone(pid)
    result = sampler.result()
    (device,) = result.devices
    assert device.samples >= 3
    assert 0 < device.device_used_baseline_bytes <= device.device_used_peak_bytes
    assert isinstance(device.power_w, Unavailable)
    assert device.as_record()["unavailable"]["power_w"].startswith("power: ")
    window = sampler.result(begin, end).devices[0]
    assert window.window_s == pytest.approx((end - begin) * 1e-9)
    assert 0 < window.samples <= device.samples
    json.dumps(device.as_record())


def test_the_cost_is_known_and_small(tmp_path):
    with Sampler(["cpu"], 0.05, tmp_path / "s.jsonl") as sampler:
        niceness = os.getpriority(os.PRIO_PROCESS, sampler.pid)
        maps = Path(f"/proc/{sampler.pid}/maps").read_text()
        time.sleep(1.0)
    cost = sampler.result().cost
    assert niceness >= min(os.nice(0) + 10, 19)
    assert "libtorch" not in maps
    assert cost.cpu_fraction < 0.15
    assert cost.wall_s >= 0.9
    assert cost.samples >= 3


def test_the_first_sample_is_before_the_block(tmp_path):
    with Sampler(["cpu"], 0.05, tmp_path / "s.jsonl") as sampler:
        entered = time.monotonic_ns()
    file = read_samples(tmp_path / "s.jsonl")
    assert file.devices[0].times_ns[0] < entered
    assert sampler.result().devices[0].samples >= 2
    wall = file.wall_anchor_s + (file.devices[0].times_ns[0] - file.monotonic_anchor_ns) * 1e-9
    assert wall == pytest.approx(time.time(), abs=30)


def test_an_exception_in_the_block_ends_it(tmp_path):
    with pytest.raises(ZeroDivisionError), Sampler(["cpu"], 0.02, tmp_path / "s.jsonl") as sampler:
        pid = sampler.pid
        _ = 1 / 0
    assert _gone(pid)


PARENT = """
    import os, sys, time
    from pathlib import Path
    from megafold_bench.measure.sampler import Sampler
    with Sampler(["cpu"], 0.02, Path(sys.argv[1])) as sampler:
        if sys.argv[2] == "fork" and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        print(sampler.pid, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "mode"), [(signal.SIGKILL, "plain"), (signal.SIGTERM, "plain"), (signal.SIGKILL, "fork")]
)
def test_no_orphan_after_the_parent_is_killed(tmp_path, number, mode):
    """Also where a forked process holds the pipe's other end, so that it never closes."""
    path = tmp_path / "s.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(path), mode]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        pid = int(parent.stdout.readline())
        assert _alive(pid)
        parent.send_signal(number)
        parent.wait(timeout=10)
        assert _gone(pid)
        file = read_samples(path)
        assert len(file.devices[0].times_ns) >= 1
        assert file.footer is not None
    finally:
        try:
            os.killpg(parent.pid, signal.SIGKILL)
        except ProcessLookupError:
            assert mode == "plain"
        parent.stdout.close()


def test_a_killed_sampler_leaves_its_samples(tmp_path):
    with Sampler(["cpu"], 0.02, tmp_path / "s.jsonl") as sampler:
        time.sleep(0.1)
        os.kill(sampler.pid, signal.SIGKILL)
    result = sampler.result()
    assert result.devices[0].samples >= 1
    assert isinstance(result.cost, Unavailable)


def test_a_dose_makes_every_reading_more_often(tmp_path):
    def watch(dose):
        with Sampler(["cpu"], 0.05, tmp_path / f"{dose}.jsonl", dose) as sampler:
            time.sleep(0.6)
        rows = [json.loads(line) for line in (tmp_path / f"{dose}.jsonl").read_text().splitlines()]
        full = [row for row in rows if isinstance(row, list) and len(row) > 4]
        return sampler.result().cost.samples, len(full), rows[0]["interval_s"]

    samples, full, interval = watch(1)
    dosed_samples, dosed_full, dosed_interval = watch(5)
    assert (interval, dosed_interval) == (0.05, 0.01)
    assert 2.5 * samples < dosed_samples and 2.5 * full < dosed_full
    with pytest.raises(ValueError, match="dose of 0"):
        Sampler(["cpu"], 0.05, tmp_path / "s.jsonl", 0)


def test_ctrl_c_is_left_to_the_parent(tmp_path):
    with Sampler(["cpu"], 0.02, tmp_path / "s.jsonl") as sampler:
        os.kill(sampler.pid, signal.SIGINT)
        time.sleep(0.1)
        assert _alive(sampler.pid)
    assert not isinstance(sampler.result().cost, Unavailable)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="at least one device"):
        Sampler([], 0.05, tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="1 ms"):
        Sampler(["cpu"], 0.0, tmp_path / "s.jsonl")
    with (
        pytest.raises(RuntimeError, match=r"did not start.*selector"),
        Sampler(["tpu:0"], 0.05, tmp_path / "s.jsonl"),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match=r"did not start.*No such file"),
        Sampler(["cpu"], 0.05, tmp_path / "no" / "s.jsonl"),
    ):
        pass


def _file(path, rows, **header):
    lines = [
        {"schema": 1, "interval_s": 0.05, "selectors": ["nvidia:GPU-x"], "unavailable": [{"sm_clock_hz": "why not"}],
         "wall_anchor_s": 1.0, "monotonic_anchor_ns": 0, **header},
        *rows,
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _rows():
    """Ten seconds at 100 ms: 400 W, a counter that agrees, 20 % of the samples throttled, memory up to 9 GB."""
    return [
        [0, i * 10**8, 2 * 10**6, 10**9 + (8 * 10**9 if i == 50 else 0), 400.0, 5000.0 + 40.0 * i, 0.9, None,
         3.2e9, 40.0 + i / 10, ["sw_power_cap"] if i % 5 == 0 else [],
         1000 * i, 10**9 - (i if i == 100 else 0)]
        for i in range(101)
    ]  # fmt: skip


def test_summary_of_known_samples(tmp_path):
    file = read_samples(_file(tmp_path / "s.jsonl", _rows()))
    summary = summarise_device(file.devices[0])
    assert (summary.device_used_baseline_bytes, summary.device_used_peak_bytes) == (10**9, 9 * 10**9)
    assert summary.energy.energy_j == pytest.approx(4000.0)
    assert summary.link_rx_bytes == 100_000
    assert summary.link_tx_bytes == Unavailable("link_tx_bytes: the counter wrapped")
    assert summary.energy.ratio == pytest.approx(1.0)
    assert summary.energy.valid
    assert summary.throttle_fraction == pytest.approx(21 / 101)
    assert summary.throttle_reasons == {"sw_power_cap": pytest.approx(21 / 101)}
    assert (summary.temperature_c.start, summary.temperature_c.end, summary.temperature_c.max) == (
        40.0,
        50.0,
        50.0,
    )
    assert summary.sm_clock_hz == Unavailable("why not")
    assert summary.latency_s.median == pytest.approx(0.002)
    half = summarise_device(file.devices[0], 6 * 10**9, 9 * 10**9)
    assert half.device_used_peak_bytes == 10**9
    assert half.energy.energy_j == pytest.approx(1200.0)


def test_a_torn_last_line_is_read_up_to(tmp_path):
    path = _file(tmp_path / "s.jsonl", _rows())
    path.write_text(path.read_text() + "[0,1010000")
    file = read_samples(path)
    assert file.torn
    assert len(file.devices[0].times_ns) == 101


def test_foreign_and_newer_files_are_refused(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("hello\n")
    with pytest.raises(UserError, match="not a file of device samples"):
        read_samples(other)
    with pytest.raises(UserError, match="schema 9"):
        read_samples(_file(tmp_path / "s.jsonl", [], schema=9))


def test_a_file_without_samples_has_reasons(tmp_path):
    summary = summarise_device(read_samples(_file(tmp_path / "s.jsonl", [])).devices[0])
    assert isinstance(summary.device_used_peak_bytes, Unavailable)
    assert isinstance(summary.energy.energy_j, Unavailable)
    assert isinstance(summary.latency_s, Unavailable)
