from __future__ import annotations

import json
from collections import Counter

import pytest

from megafold_bench import __version__
from megafold_bench.errors import UserError
from megafold_bench.launchers import LocalLauncher
from megafold_bench.points import Phase
from megafold_bench.records import ResultsWarning, read_results
from megafold_bench.runs import write_atomically
from megafold_bench.sweep import Runner, SweepSpec, dominated_by, parse_seq_lens, plan, run_plan


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("64:256:64", (64, 128, 192, 256)),
        ("384,512", (384, 512)),
        ("512,384,384", (384, 512)),
        ("10", (10,)),
        ("1:4:2,9", (1, 3, 9)),
    ],
)
def test_seq_lens(text, lengths):
    assert parse_seq_lens(text) == lengths


@pytest.mark.parametrize(
    "text", ["0", "10:1", "10:1:1", "1:10", "1:2:3:4", "", "a", "1.5", "-4", "64:256:0", "1,,2"]
)
def test_bad_seq_lens_are_named_with_a_remedy(text):
    with pytest.raises(UserError) as caught:
        parse_seq_lens(text)
    assert str(caught.value).startswith(f"--seq-lens {text}:") and "write" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": ()}, "--variants"),
        ({"variants": ("fake", "fake")}, "twice"),
        ({"device": "tpu"}, "--device tpu"),
        ({"steps": 0}, "--steps 0"),
        ({"warmup": 0}, "--warmup 0"),
        ({"repeats": -1}, "--repeats -1"),
        ({"timeout_s": 0.0}, "--timeout 0"),
        ({"timeout_s": float("nan")}, "--timeout nan"),
        ({"seed": 2**32}, "--seed"),
    ],
)
def test_impossible_specs(spec, change, words):
    with pytest.raises(UserError, match=words):
        spec(**change)


def test_spec_round_trip(spec):
    asked = spec(options={"preset": "tiny"}, alloc_conf="x")
    assert SweepSpec.from_dict(json.loads(json.dumps(asked.as_dict()))) == asked


def test_plan_interleaves_and_turns_round(fakes, spec):
    trials = plan(spec(variants=("fake", "fake-slow"), seq_lens=(32, 64), repeats=2))
    times = [(t.point.variant, t.point.seq_len, t.repeat) for t in trials if t.point.phase is Phase.TIME]
    assert times == [
        ("fake", 32, 0),
        ("fake-slow", 32, 0),
        ("fake-slow", 64, 0),
        ("fake", 64, 0),
        ("fake-slow", 32, 1),
        ("fake", 32, 1),
        ("fake", 64, 1),
        ("fake-slow", 64, 1),
    ]
    memory = [t for t in trials if t.point.phase is Phase.MEMORY]
    assert Counter((t.point.variant, t.point.seq_len) for t in memory) == Counter(
        {(v, n): 1 for v in ("fake", "fake-slow") for n in (32, 64)}
    )
    assert len({t.trial_id for t in trials}) == len(trials) == 12
    assert {t.point.steps for t in memory} == {3}


def test_unknown_variant_and_option(fakes, spec):
    with pytest.raises(UserError, match="unknown variant 'nope'"):
        plan(spec(variants=("nope",)))
    with pytest.raises(UserError, match="unknown option 'speling'"):
        plan(spec(options={"speling": 1}))


@pytest.fixture
def run(open_run, listener):
    def run_(spec, resume=False, retry=lambda record: False):
        folder = open_run(spec, resume=resume)
        runner = Runner(folder, LocalLauncher(), listener, spec.timeout_s, retry=retry)
        records = run_plan(plan(spec), runner)
        folder.close()
        return records

    return run_


def test_sweep_leaves_one_record_per_trial(run, spec, tmp_path):
    asked = spec(seq_lens=(32, 48), repeats=2)
    records = run(asked)
    on_disk = read_results(tmp_path / "run/results.jsonl")
    assert on_disk == json.loads(json.dumps(records))
    assert [r["trial_id"] for r in on_disk] == [t.trial_id for t in plan(asked)]
    assert {r["outcome"]["status"] for r in on_disk} == {"ok"}
    assert list((tmp_path / "run/pending").iterdir()) == []


def test_time_record(run, spec):
    record = run(spec(options={"step_ms": 5.0}))[0]
    times = record["time"]
    assert len(times["samples"]["step_time_s"]) == 6
    assert len(times["warmup_samples"]["step_time_s"]) == 1
    assert 0.005 <= times["step_time_s"]["median"] < 0.05
    assert times["step_time_s"]["n"] == 6
    assert times["throughput_tokens_per_s"] == pytest.approx(32 / times["step_time_s"]["median"])
    assert times["gpu_step_time_s"] is None
    assert "time.gpu_step_time_s" in record["unavailable"]
    assert record["memory"] is None
    assert record["losses"] == [1 / n for n in range(1, 8)]
    assert record["facts"]["n_atoms"] == 256


def test_memory_record(run, spec):
    record = run(spec())[1]
    assert record["factors"]["phase"] == "memory"
    assert record["time"] is None
    assert record["memory"]["host_rss_peak_bytes"] >= record["memory"]["host_rss_baseline_bytes"] > 1 << 20
    assert record["memory"]["reserved_peak_bytes"] is None
    assert record["unavailable"]["memory.reserved_peak_bytes"] == "measured on GPUs only"
    assert record["memory"]["steps"] == len(record["losses"]) == 3


def test_finished_points_are_not_run_again(run, spec, listener, tmp_path):
    asked = spec(options={"touch": str(tmp_path / "touched")}, repeats=2)
    first = run(asked)
    assert run(asked, resume=True) == json.loads(json.dumps(first))
    assert len(listener.trials) == 3
    assert len((tmp_path / "touched").read_text().splitlines()) == 3


def test_resumption_mends_a_torn_line_and_runs_that_trial_again(run, spec, listener, tmp_path):
    asked = spec(repeats=2)
    run(asked)
    path = tmp_path / "run/results.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    listener.trials.clear()
    with pytest.warns(ResultsWarning):
        run(asked, resume=True)
    assert len(listener.trials) == 1
    with pytest.warns(ResultsWarning):
        assert len(read_results(path)) == 3


def test_record_left_by_a_worker_is_adopted_not_run_again(run, open_run, spec, listener, tmp_path):
    """The sweep was killed after its worker had left the record and before it was appended."""
    asked = spec(options={"touch": str(tmp_path / "touched")}, repeats=2)
    run(asked)
    path = tmp_path / "run/results.jsonl"
    *kept, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept))
    write_atomically(tmp_path / "run/pending/x.1.old.json", last)
    listener.trials.clear()
    run(asked, resume=True)
    assert listener.trials == []
    assert [r["trial_id"] for r in read_results(path)] == [t.trial_id for t in plan(asked)]
    assert len((tmp_path / "touched").read_text().splitlines()) == 3


def test_worker_killed_as_it_writes_its_record(run, spec, tmp_path):
    """Half a record is no record, and the run folder is as clean as after any other crash."""
    records = run(spec(options={"ending": "kill_at_record"}))
    assert {(r["outcome"]["status"], r["outcome"]["signal"]) for r in records} == {("crash", "SIGKILL")}
    assert list((tmp_path / "run/pending").iterdir()) == []


def test_failed_trials_can_be_retried(run, spec, tmp_path):
    asked = spec(options={"ending": "kill"})
    run(asked)
    again = run(asked, resume=True, retry=lambda record: record["outcome"]["status"] == "crash")
    assert [r["attempt"] for r in again] == [2, 2]
    assert [r["attempt"] for r in read_results(tmp_path / "run/results.jsonl")] == [1, 1, 2, 2]


def test_failure_at_one_length_does_not_stop_the_others(run, spec):
    records = run(spec(seq_lens=(32, 64), options={"ending": "segv@64"}))
    assert [r["outcome"]["status"] for r in records] == ["ok", "ok", "crash", "crash"]
    assert {r["provenance"]["source"]["version"] for r in records} == {__version__}


def test_lengths_beyond_two_memory_failures_are_skipped_with_a_record(run, spec, listener):
    records = run(spec(seq_lens=(32, 48, 64, 80), options={"ending": "oom_device@48"}))
    statuses = [(r["factors"]["seq_len_tokens"], r["outcome"]["status"]) for r in records]
    assert statuses == [
        *[(32, "ok")] * 2,
        *[(48, "oom_device")] * 2,
        *[(64, "oom_device")] * 2,
        *[(80, "skipped_dominated")] * 2,
    ]
    assert records[-1]["outcome"]["status_detail"] == "out of memory already at 48 and 64"
    assert len(listener.trials) == 6


def test_domination_is_by_variant_and_phase(fakes, spec):
    trials = plan(spec(variants=("fake", "fake-slow"), seq_lens=(32, 64)))

    def record(trial, status):
        return {"factors": trial.point.factors, "outcome": {"status": status}}

    short = {(t.point.variant, t.point.phase): t for t in trials if t.point.seq_len == 32}
    long = {(t.point.variant, t.point.phase): t for t in trials if t.point.seq_len == 64}
    slow = [record(short["fake", Phase.TIME], "timeout")]
    assert dominated_by(long["fake", Phase.TIME], slow) == "over the wall limit already at 32"
    assert dominated_by(long["fake", Phase.MEMORY], slow) is None
    assert dominated_by(long["fake-slow", Phase.TIME], slow) is None
    assert dominated_by(long["fake", Phase.TIME], [record(short["fake", Phase.TIME], "oom_device")]) is None


def test_fault_of_the_user_ends_the_sweep_and_keeps_the_records(open_run, listener, spec, tmp_path):
    asked = spec(options={"ending": "user_error"})
    folder = open_run(asked)
    with pytest.raises(UserError, match="12 tokens"):
        run_plan(plan(asked), Runner(folder, LocalLauncher(), listener, 20.0))
    assert folder.records == []


def test_telemetry_is_recorded(open_run, listener, spec, tmp_path):
    asked = spec(options={"step_ms": 20.0})
    folder = open_run(asked)
    record = Runner(folder, LocalLauncher(), listener, 20.0, sample_interval_s=0.01).run(plan(asked)[0], 1, 1)
    assert record["outcome"]["status"] == "ok"
    assert record["telemetry"]["samples"] >= 3
    assert record["telemetry"]["sample_interval_s"] == 0.01
    assert record["telemetry"]["cost"]["cpu_fraction"] < 1
    assert (tmp_path / "run/samples" / f"{record['trial_id']}.1.jsonl").exists()


def test_without_a_sampler_the_record_says_so(run, spec):
    record = run(spec())[0]
    assert record["telemetry"] is None
    assert record["unavailable"]["telemetry"] == "sampling was switched off"
