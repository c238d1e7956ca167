"""What is added to a worker's record."""

import json
from pathlib import Path

import pytest

from megafold_bench.finish import finish, over_capacity
from megafold_bench.outcomes import Outcome

RUN = Path(__file__).resolve().parents[2] / "reports" / "reference" / "h200-boundary-40gib"
GIB = 2**30


@pytest.fixture
def record():
    """A trial that fitted at 40 GiB: 38.7 GiB reserved and 0.84 outside the allocator."""
    return json.loads((RUN / "results.jsonl").read_text().splitlines()[0])


def test_more_than_the_emulated_card_has(record):
    assert record["outcome"]["status"] == "ok" and not over_capacity(record)
    record["factors"]["capacity_emulated_bytes"] = round(39.5 * GIB)
    assert "over_capacity" in finish(record)["quality"]
    assert finish(record)["quality"].count("over_capacity") == 1


def test_only_trials_that_passed_on_a_limited_device(record):
    record["factors"]["capacity_emulated_bytes"] = None
    assert not over_capacity(record)
    record["factors"]["capacity_emulated_bytes"] = GIB
    assert over_capacity(record)
    assert not over_capacity({**record, "memory": None})
    record["outcome"]["status"] = Outcome.OOM_DEVICE.value
    assert not over_capacity(record)
