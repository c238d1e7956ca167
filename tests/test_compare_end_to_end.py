"""Sweeps of the same commit, in real processes, are the same; one that is made 5 % slower is seen to be.

Steps sleep for 80 ms, so that 5 % is 4 ms, far above what a busy machine adds to the median of a sleep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKES = ROOT / "tests" / "fakes"
SWEEP = ["sweep", "--variants", "fake", "--device", "cpu", "--seq-lens", "16", "--option", "step_ms=80"]
COUNTS = ["--steps", "7", "--warmup", "1", "--repeats", "3"]


def megafold_bench(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    path = os.pathsep.join([str(FAKES), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import cli; cli.main()", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two sweeps of this commit, and one whose steps were made 5 % longer by something that is no factor."""
    folder = tmp_path_factory.mktemp("runs")
    for name, slowdown in (("before", "1"), ("after", "1"), ("slower", "1.05")):
        ended = megafold_bench(*SWEEP, *COUNTS, "--out", folder / name, FAKE_SLOWDOWN=slowdown)
        assert ended.returncode == 0, ended.stderr
    return {name: folder / name for name in ("before", "after", "slower")}


def test_two_sweeps_of_one_commit_show_no_change(runs):
    ended = megafold_bench("compare", runs["before"], runs["after"], "--fail-above", "3%")
    assert ended.returncode == 0, ended.stdout
    assert "No change of step time at 1 points" in ended.stdout
    assert "above --fail-above" not in ended.stdout


def test_slow_down_has_the_right_sign_and_fails(runs, tmp_path):
    ended = megafold_bench(
        "compare", runs["before"], runs["slower"], "--fail-above", "3%", "--out", tmp_path / "figure"
    )
    assert ended.returncode == 1, ended.stdout
    assert "1 of 1 points slower, 0 faster" in ended.stdout
    assert "above --fail-above: fake 16: slower by" in ended.stdout
    (table,) = (tmp_path / "figure").glob("*.csv")
    ratio = pd.read_csv(table).loc[0, "time_ratio"]
    assert 1.035 < ratio < 1.065


def test_the_other_way_round_is_faster_and_passes(runs):
    ended = megafold_bench("compare", runs["slower"], runs["before"], "--fail-above", "3%")
    assert ended.returncode == 0, ended.stdout
    assert "0 of 1 points slower, 1 faster" in ended.stdout


def test_a_wider_limit_reports_and_passes(runs):
    ended = megafold_bench("compare", runs["before"], runs["slower"], "--fail-above", "10%")
    assert ended.returncode == 0, ended.stdout
    assert "1 of 1 points slower" in ended.stdout


def test_points_are_the_same_although_times_are_not(runs):
    def points(run):
        return [json.loads(line)["point_id"] for line in (run / "results.jsonl").read_text().splitlines()]

    assert points(runs["before"]) == points(runs["after"]) == points(runs["slower"])
