from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megafold_bench import runs
from megafold_bench.errors import UserError
from megafold_bench.records import ResultsWarning, read_results
from megafold_bench.runs import RunFolder, append_line, write_atomically

SPEC = {"variants": ["a"], "timeout_s": 10.0}


def open_run(path: Path, *, spec=SPEC, resume=False, kind="sweep") -> RunFolder:
    return RunFolder.open(path, kind=kind, spec=spec, environment=lambda: {"torch": "2.13"}, resume=resume)


def record(trial: str, attempt: int = 1, ended_at: str = "2026-01-01T00:00:00.000+00:00") -> dict:
    return {"schema_version": 1, "trial_id": trial, "attempt": attempt, "ended_at": ended_at}


def test_new_folder_holds_a_manifest(tmp_path):
    with open_run(tmp_path / "deep/run") as folder:
        manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["spec"] == SPEC
    assert manifest["environment"] == {"torch": "2.13"}
    assert manifest["schema_version"] == 1


def test_empty_folder_is_accepted(tmp_path):
    open_run(tmp_path).close()
    assert (tmp_path / "manifest.json").exists()


def test_folder_abandoned_before_its_manifest_is_accepted(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / ".manifest.json.1234").write_text("{")
    open_run(tmp_path).close()
    assert (tmp_path / "manifest.json").exists()


def test_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a run folder"):
        open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_as_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(UserError, match=r"choose a|cannot"):
        open_run(tmp_path / "file/run")


def test_same_run_needs_resume(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(UserError, match="--resume"):
        open_run(tmp_path)
    open_run(tmp_path, resume=True).close()


def test_other_settings_are_named(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(UserError, match=r"variants: \['b'\] now, \['a'\] in the run"):
        open_run(tmp_path, spec={**SPEC, "variants": ["b"]}, resume=True)
    with pytest.raises(UserError, match="holds a sweep run"):
        open_run(tmp_path, kind="boundary", resume=True)


def test_timeout_may_change(tmp_path):
    open_run(tmp_path).close()
    open_run(tmp_path, spec={**SPEC, "timeout_s": 20.0}, resume=True).close()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        open_run(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_second_sweep_is_told_who_holds_the_folder(tmp_path):
    with open_run(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on .+"):
        open_run(tmp_path, resume=True)
    open_run(tmp_path, resume=True).close()


def test_lock_dies_with_its_holder(tmp_path):
    open_run(tmp_path).close()
    code = f"""
import fcntl, sys
held = open({str(tmp_path / "lock")!r}, "r+"); fcntl.flock(held, fcntl.LOCK_EX)
print("held", flush=True); sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="in use"):
        open_run(tmp_path, resume=True)
    holder.kill()
    holder.communicate()
    open_run(tmp_path, resume=True).close()


def test_torn_line_is_mended_without_touching_what_is_there(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_run(tmp_path) as folder:
        folder.append(record("a"))
    before = path.read_bytes() + b'{"schema_version": 1, "trial'
    path.write_bytes(before)
    with pytest.warns(ResultsWarning), open_run(tmp_path, resume=True) as folder:
        folder.append(record("b"))
    assert path.read_bytes().startswith(before)
    with pytest.warns(ResultsWarning):
        assert [r["trial_id"] for r in read_results(path)] == ["a", "b"]


def test_short_write_is_finished(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(runs.os, "write", lambda fd, data: real(fd, data[:7]))
    append_line(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789\n"


def test_disk_full(tmp_path):
    with open_run(tmp_path) as folder:
        folder.results_path.symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"is full: free some space.*--resume"):
            folder.append(record("a"))


def test_disk_that_fills_in_the_middle_of_a_line(tmp_path):
    """The file system takes part of a line only; later there is room again."""
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_run(tmp_path) as folder:
        folder.append(record("a"))
        size = folder.results_path.stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
            with pytest.raises(UserError, match="cannot append to"):
                folder.append(record("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert folder.results_path.stat().st_size == size + 20
        folder.append(record("b"))
    with pytest.warns(ResultsWarning):
        assert [r["trial_id"] for r in read_results(folder.results_path)] == ["a", "b"]


def test_unwritable_out():
    with pytest.raises(UserError, match="/proc/megafold"):
        open_run(Path("/proc/megafold-bench-run"))


@pytest.mark.parametrize(
    ("number", "words"), [(28, "full"), (30, "writable"), (13, "writable"), (5, "cannot")]
)
def test_operating_system_errors_are_explained(number, words):
    error = OSError(number, os.strerror(number))
    assert words in str(runs.explain_os_error(error, Path("x"), "write to"))


def test_one_attempt_is_recorded_once(tmp_path):
    with open_run(tmp_path) as folder:
        folder.append(record("a"))
        with pytest.raises(ValueError, match="already"):
            folder.append(record("a"))


def test_pending_records_are_adopted_once(tmp_path):
    with open_run(tmp_path) as folder:
        folder.append(record("a"))
        for trial in ("a", "b"):
            write_atomically(folder.record_path(trial, 1), json.dumps(record(trial)).encode())
    with open_run(tmp_path, resume=True) as folder:
        # A worker of the killed sweep that left its record late.
        write_atomically(folder.record_path("b", 1), json.dumps(record("b")).encode())
        assert [r["trial_id"] for r in folder.adopt_pending(lambda r: r)] == ["b"]
        assert list((tmp_path / "pending").iterdir()) == []
    assert [r["trial_id"] for r in read_results(folder.results_path)] == ["a", "b"]


def test_write_atomically_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "f", b"x")
    assert list(tmp_path.iterdir()) == []


def test_clock_that_went_backwards_is_said(tmp_path):
    with open_run(tmp_path) as folder:
        folder.append(record("a", ended_at="2999-01-01T00:00:00.000+00:00"))
    with pytest.warns(ResultsWarning, match="clock is"):
        open_run(tmp_path, resume=True).close()


def test_clock_in_order_is_not_mentioned(tmp_path):
    with open_run(tmp_path) as folder:
        folder.append(record("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_run(tmp_path, resume=True).close()


def test_newer_manifest_is_refused(tmp_path):
    open_run(tmp_path).close()
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(UserError, match="schema version 2"):
        open_run(tmp_path, resume=True)
