from __future__ import annotations

import gc
import time
from typing import ClassVar

import pytest

from megafold_bench.measure.steps import HostTimer, StepLog, run_steps, timed_step
from megafold_bench.outcomes import NonFiniteLossError


class Slow:
    """Each part of a step sleeps for a time of its own."""

    facts: ClassVar[dict[str, int]] = {}

    def load(self):
        time.sleep(0.01)
        return 1

    def transfer(self, batch):
        time.sleep(0.02)
        return batch + 1

    def step(self, batch):
        time.sleep(0.03)
        return {"loss": float(batch)}


class Events:
    """A device whose clock ticks once per mark: every interval is the number of marks between."""

    def __init__(self):
        self.marks = 0
        self.waits = 0

    def synchronise(self):
        self.waits += 1

    def mark(self):
        self.marks += 1
        return self.marks

    def elapsed_s(self, start, end):
        return float(end - start)


def test_parts_of_a_step_are_told_apart():
    times, loss = timed_step(Slow(), HostTimer())
    assert loss == 2.0
    assert times["data_wait_s"] == pytest.approx(0.01, abs=0.008)
    assert times["h2d_s"] == pytest.approx(0.02, abs=0.012)
    assert times["step_time_s"] >= 0.06
    assert times["gpu_step_time_s"] is None and times["enqueue_s"] is None


def test_device_events_time_the_transfer_and_the_step():
    timer = Events()
    times, _ = timed_step(Slow(), timer)
    assert (times["h2d_s"], times["gpu_step_time_s"]) == (1.0, 1.0)
    assert times["enqueue_s"] == pytest.approx(0.03, abs=0.02)
    assert timer.waits == 1


class Losses:
    facts: ClassVar[dict[str, int]] = {}

    def __init__(self, losses):
        self._losses = iter(losses)
        self.collecting: list[bool] = []

    def load(self):
        return None

    def transfer(self, batch):
        return batch

    def step(self, batch):
        self.collecting.append(gc.isenabled())
        return {"loss": next(self._losses)}


def test_samples_stay_in_order_and_the_collector_is_quiet():
    log, seen = StepLog(), []
    workload = Losses([3.0, 2.0, 1.0])
    run_steps(workload, HostTimer(), 3, log, seen.append)
    assert log.losses == [3.0, 2.0, 1.0]
    assert seen == [0, 1, 2]
    assert workload.collecting == [False] * 3
    assert gc.isenabled()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_loss_that_is_not_finite_ends_the_run_and_stays_in_the_log(bad):
    log = StepLog()
    with pytest.raises(NonFiniteLossError, match="step 1"):
        run_steps(Losses([1.0, bad, 1.0]), HostTimer(), 3, log, lambda index: None)
    assert len(log.losses) == 2 == len(log.series["step_time_s"])
    assert gc.isenabled()
