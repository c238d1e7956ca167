import json
import sys

import pytest

from megafold_bench.errors import UserError
from optimized.kernels import bench, processes
from optimized.kernels.bench import Request, groups, run, summary
from optimized.kernels.implementations import MODULES
from optimized.kernels.processes import run_group, task
from reports.kernel_rows import kernel_frame, read_rows

WORKER = """
import json, os, sys, time
order = json.load(sys.stdin)
for task in order["tasks"]:
    what = task["arguments"]["what"]
    if what == "dies": os.abort()
    if what == "hangs": time.sleep(60)
    outcome = {"raises": "oom_device", "absent": "unsupported"}.get(what, "ok")
    with open(order["rows"], "a") as f:
        f.write(json.dumps({"kind": task["kind"], **task["arguments"], "outcome": outcome, "pid": os.getpid()}) + "\\n")
    if outcome == "oom_device": sys.exit(3)
"""


@pytest.fixture
def worker(monkeypatch):
    popen = processes.subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", WORKER], **rest)
    )


def outcomes(names, tmp_path, timeout_s=20.0):
    rows = list(run_group([task("t", what=name) for name in names], tmp_path / "logs" / "x.log", timeout_s))
    assert [row["what"] for row in rows] == list(names)
    return rows


def test_a_group_shares_a_process_until_something_fails(worker, tmp_path):
    rows = outcomes(["a", "absent", "raises", "b"], tmp_path)
    assert [row["outcome"] for row in rows] == ["ok", "unsupported", "oom_device", "ok"]
    assert rows[0]["pid"] == rows[2]["pid"] != rows[3]["pid"]


def test_a_process_that_dies_is_a_row_and_the_rest_goes_on(worker, tmp_path):
    rows = outcomes(["a", "dies", "b"], tmp_path)
    assert [row["outcome"] for row in rows] == ["ok", "crash", "ok"]
    assert "SIGABRT" in rows[1]["detail"]


def test_a_process_that_hangs_is_ended(worker, tmp_path):
    (row,) = outcomes(["hangs"], tmp_path, timeout_s=1.0)
    assert row["outcome"] == "timeout"


def test_requests_are_checked():
    request = Request.parse("transition", "768,384", "fp32,bf16", "fwd", None, "cpu")
    assert request.tokens == (384, 768) and request.dtypes == ("fp32", "bf16")
    names = [name for name, _ in groups(request)]
    assert names[0] == "ceilings" and "transition-bf16-megafold" in names
    assert not any("flex" in name for name in names)
    asked = Request.parse("transition", None, None, None, "flex", "cpu")
    assert [name for name, _ in groups(asked)][1:] == ["transition-bf16-flex"]
    for words, match in (
        (("nope", None, None, None, None), "--op nope"),
        ((None, "1", None, None, None), "--n 1"),
        ((None, None, "int8", None, None), "--dtype int8"),
        ((None, None, None, "back", None), "--pass back"),
        ((None, None, None, None, "mine"), "--impl mine"),
    ):
        with pytest.raises(UserError, match=match):
            Request.parse(*words, "cpu")
    with pytest.raises(UserError, match="--device tpu"):
        Request.parse(None, None, None, None, None, "tpu")


def test_measurements_on_a_cpu_end_up_in_the_folder(tmp_path):
    request = Request.parse("layer_norm_linear", "6,9", "fp32", "fwd,fwdbwd", "definition,flex", "cpu")
    rows = list(run(request, tmp_path))
    assert [row["kind"] for row in rows] == ["environment", "ceilings", *["measurement"] * 4]
    assert len({row["run"] for row in rows}) == 1 and rows[0]["environment"]["software"]["torch"]
    stored = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert stored == rows
    first = rows[2]
    assert first["outcome"] == "ok" and set(first["passes"]) == {"fwd", "fwdbwd"}
    assert first["memory"] == {"fwd": None, "fwdbwd": None}
    assert first["bitwise"]["differing"] == [] and first["errors"]["own"] == first["errors"]["definition"]
    assert "fwd" in summary(first)
    assert rows[4]["outcome"] == "unsupported" and "flex has no" in summary(rows[4])
    assert list((tmp_path / "logs").iterdir())


def test_no_process_is_started_for_what_cannot_run(tmp_path, monkeypatch):
    monkeypatch.setitem(MODULES, "ds4sci", "no_such_module")
    impl = "ds4sci,megafold-tf32x3"
    request = Request.parse("triangle_attention", "6,9", "bf16", "fwd", impl, "cpu")
    monkeypatch.setattr(bench, "groups", lambda request: groups(request)[1:])  # the ceilings have a process
    monkeypatch.setattr(bench, "run_group", lambda *_: pytest.fail("a process was started"))
    rows = list(run(request, tmp_path))[1:]
    assert [row["implementation"] for row in rows] == ["ds4sci"] * 2 + ["megafold-tf32x3"] * 2
    assert {row["outcome"] for row in rows} == {"unsupported"}
    assert rows[0]["detail"] == "not installed: no module no_such_module"
    assert rows[3]["tokens"] == 9 and "float32" in rows[3]["detail"]
    assert kernel_frame(read_rows(tmp_path))["outcome"].eq("unsupported").sum() == 4
