"""Two hundred kills: no lost record, no duplicate, no orphan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megafold_bench.launchers import package_environment

KILLS = 200
STRESS = Path(__file__).resolve().parent.parent / "fakes" / "stress.py"


def test_two_hundred_kills(tmp_path, fakes):
    environment = package_environment(os.environ) | {"OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(STRESS), str(tmp_path), str(KILLS), "20261123"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["violations"] == []
    assert sum(report["kills"].values()) == KILLS
    assert len(report["kills"]) == 6, "the sweep and its processes, each by SIGINT, SIGTERM and SIGKILL"
    assert report["outcomes"]["ok"] > 0 and report["outcomes"]["crash"] > 0
