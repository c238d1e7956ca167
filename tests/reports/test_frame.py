import json

import numpy as np
import pytest

from megafold_bench.errors import UserError
from megafold_bench.outcomes import Outcome
from reports.boundary import boundaries
from reports.cells import as_frame, by_series, cells
from reports.frame import load, load_run, samples


def lines(run):
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def append(run, record):
    with (run / "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_one_row_per_trial_with_the_records_numbers(make):
    run = make("cpu", lengths=(32, 64))
    frame = load(run)
    records = lines(run)
    assert list(frame["trial_id"]) == [r["trial_id"] for r in records]
    for row, record in zip(frame.to_dict("records"), records, strict=True):
        assert row["variant"] == record["factors"]["variant"]
        if record["time"]:
            assert row["time.step_time_s.median"] == record["time"]["step_time_s"]["median"]
        else:
            assert row["memory.host_rss_peak_bytes"] == record["memory"]["host_rss_peak_bytes"]


def test_the_latest_attempt_counts(make):
    run = make("point")
    record = lines(run)[0]
    record["attempt"] = 2
    record["outcome"]["status"] = "timeout"
    record["time"] = None
    append(run, record)
    frame = load(run)
    assert len(frame) == 2
    assert frame.set_index("trial_id").loc[record["trial_id"], "status"] == "timeout"
    assert cells(load_run(run).records)[0].outcome is Outcome.TIMEOUT


def test_a_run_that_was_resumed_elsewhere_says_so(make):
    run = make("single", lengths=(256,))
    alone = load_run(run).caption
    assert "devices" not in alone and "commits" not in alone
    record = lines(run)[0]
    source = {"version": "0.1.0", "commit": "f" * 40, "dirty": False}
    record["attempt"] = 2
    record["provenance"] |= {"python": "3.12.3", "device_uuid": "another", "source": source}
    append(run, record)
    first, *others = lines(run)[1:-1]
    others = [first | {"provenance": first["provenance"] | {"device_uuid": "one"}}, *others]
    (run / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*others, record]))
    assert "on 2 devices of this kind, one after another · trials at commits " in load_run(run).caption
    assert "fffffff" in load_run(run).caption


def test_a_cell_pools_all_steps_of_all_processes(make):
    run = make("single", lengths=(256,))
    (cell,) = cells(load_run(run).records)
    steps = [s for r in lines(run) if r["time"] for s in r["time"]["samples"]["step_time_s"]]
    assert cell.time.n_steps == len(steps) == 60
    assert cell.time.median == np.median(steps)
    assert cell.time.interval.lo <= cell.time.median <= cell.time.interval.hi
    assert not cell.time.interval.within_run
    assert cell.tokens_per_s == pytest.approx(256 / np.median(steps))
    assert cell.energy_j == pytest.approx(400 * np.mean(steps), rel=0.02)
    assert cell.energy_method == "counter"


def test_one_process_is_a_within_run_interval(make):
    (cell,) = cells(load_run(make("point")).records)
    assert cell.time.interval.within_run


def test_memory_is_the_largest_over_repeats(make):
    run = make("point")
    record = next(r for r in lines(run) if r["memory"])
    record["trial_id"] += "x"
    record["memory"]["reserved_peak_bytes"] += 1 << 30
    append(run, record)
    (cell,) = cells(load_run(run).records)
    assert cell.peak_bytes == record["memory"]["reserved_peak_bytes"]
    assert cell.memory_spread_bytes == 1 << 30
    assert "memory_varies" in cell.flags


def test_repeats_that_end_differently_are_flagged_and_failure_wins(make):
    run = make("point")
    record = next(r for r in lines(run) if r["time"])
    record["trial_id"] += "x"
    record["outcome"]["status"] = "oom_device"
    record["time"] = None
    append(run, record)
    (cell,) = cells(load_run(run).records)
    assert cell.outcome is Outcome.OOM_DEVICE
    assert "mixed_outcomes" in cell.flags
    assert cell.time is not None


def test_flags_from_records_and_telemetry(make):
    run = make("point", quality={("pytorch", 384): ["clock_backwards"]})
    record = lines(run)[0]
    record["attempt"] = 2
    record["telemetry"]["throttle_fraction"] = 0.2
    append(run, record)
    (cell,) = cells(load_run(run).records)
    assert cell.flags == ("clock_backwards", "throttled")


def test_low_clocks_while_memory_was_measured_are_no_flag(make):
    run = make("point")
    record = next(r for r in lines(run) if r["factors"]["phase"] == "memory")
    record |= {"attempt": 2, "telemetry": {"throttle_fraction": 0.9}}
    append(run, record)
    (cell,) = cells(load_run(run).records)
    assert cell.flags == ()


def test_series_of_one_variant_are_told_apart_by_what_varies(make):
    run = make("point")
    for record in lines(run):
        record["factors"]["capacity_emulated_bytes"] = 40 << 30
        record["trial_id"] += "x"
        append(run, record)
    names = list(by_series(cells(load_run(run).records)))
    assert names == ["pytorch · no limit", "pytorch · limit 40.0 GiB"]


def test_an_option_that_older_records_lack_sets_them_apart(make):
    """As where a run was resumed by a version with a new option: its memory trial is not that of the older time trial."""
    run = make("point")
    held = lines(run)
    for record in held:
        record["factors"]["workload"] |= {"graphs": True} if record["memory"] else {}
    (run / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held))
    older, newer = cells(load_run(run).records)
    assert older.time and older.peak_bytes is None
    assert newer.peak_bytes and newer.time is None and newer.series.endswith(" · graphs=True")


def test_boundary_from_records(make):
    found = {b.series: b for b in boundaries(cells(load_run(make("nvidia", repeats=1, steps=6)).records))}
    assert (found["pytorch"].max_ok, found["pytorch"].min_fail, found["pytorch"].monotone) == (
        768,
        1024,
        True,
    )
    assert (found["megafold"].max_ok, found["megafold"].min_fail) == (1024, None)
    assert found["pytorch"].text() == "768 fits, 1024 does not"


def test_boundary_of_a_run_that_only_failed(make):
    found = {b.series: b for b in boundaries(cells(load_run(make("failed")).records))}
    assert (found["pytorch"].max_ok, found["pytorch"].min_fail) == (None, 384)
    assert found["inductor"].other_end == "crash at 384"
    assert found["inductor"].min_fail is None


def test_a_torn_line_is_a_warning_and_the_rest_is_read(make):
    run = make("point")
    path = run / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    loaded = load_run(run)
    assert len(loaded.records) == 1
    assert "torn" in loaded.warnings[0]


def test_samples_in_order(make):
    run = make("point")
    frame = samples(load_run(run))
    steps = frame[(frame["quantity"] == "step_time_s") & ~frame["warmup"]]
    record = next(r for r in lines(run) if r["time"])
    assert list(steps["value_s"]) == record["time"]["samples"]["step_time_s"]


def test_not_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        load(tmp_path)


def test_provenance_of_a_cpu_run_names_the_cpu(make):
    provenance = load_run(make("cpu", lengths=(32,), repeats=1)).provenance
    assert provenance.device == "Fixture CPU @ 2.5 GHz"
    assert provenance.caption().startswith("FIXTURE")


def test_as_frame_has_no_zero_for_what_is_missing(make):
    frame = as_frame(cells(load_run(make("failed")).records))
    assert frame["step_time_median_s"].isna().all()
    assert frame["reserved_peak_bytes"].isna().all()


def test_captions_name_the_options_asked_for(make):
    run = make("cpu", lengths=(32,))
    assert "=" not in load_run(run).caption
    manifest = json.loads((run / "manifest.json").read_text())
    for spec in (manifest["spec"], {"base": manifest["spec"]}):  # of a sweep, of a boundary search
        manifest["spec"]["options"] = {
            "preset": "af3",
            "input": "complexes/7a4d",
            "offload": True,
            "chunk": 4,
        }
        (run / "manifest.json").write_text(json.dumps({**manifest, "spec": spec}))
        assert load_run(run).caption.endswith(" · offload=true, chunk=4")
