from __future__ import annotations

import dataclasses

import pytest

from megafold_bench.points import Phase, Point, Trial, canonical_id

POINT = Point("v", 64, Phase.TIME, "cpu", 0, 20, 3, {"preset": "tiny", "cycles": 2})


def test_id_follows_from_content_not_from_order():
    same = dataclasses.replace(POINT, workload={"cycles": 2, "preset": "tiny"})
    assert same.point_id == POINT.point_id
    assert len(POINT.point_id) == 16


def test_id_is_stable_across_versions():
    # A changed id orphans every recorded run: bump the schema version with it.
    assert canonical_id({"b": [1, 2.5, None], "a": "é"}) == "84afbf1d4853005f"


@pytest.mark.parametrize(
    "change",
    [
        {"variant": "w"},
        {"seq_len": 65},
        {"phase": Phase.MEMORY},
        {"device": "cuda"},
        {"seed": 1},
        {"steps": 21},
        {"warmup": 4},
        {"workload": {"preset": "tiny", "cycles": 3}},
        {"capacity_emulated_bytes": 1},
        {"world_size": 2},
        {"alloc_conf": "x"},
    ],
)
def test_every_factor_changes_the_id(change):
    assert dataclasses.replace(POINT, **change).point_id != POINT.point_id


def test_case_joins_the_phases():
    memory = POINT.at_phase(Phase.MEMORY, 3, 0)
    assert memory.case_id == POINT.case_id
    assert memory.point_id != POINT.point_id
    assert dataclasses.replace(POINT, seq_len=65).case_id != POINT.case_id


def test_round_trip():
    assert Point.from_factors(POINT.factors) == POINT


def test_workload_is_frozen():
    with pytest.raises(TypeError):
        POINT.workload["cycles"] = 3  # type: ignore[index]


def test_trial_id_names_the_repeat():
    assert Trial(POINT, 2).trial_id == f"{POINT.point_id}-2"
