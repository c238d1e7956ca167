import io
import json

import pandas as pd
import pytest
from rich.console import Console

from megafold_bench.errors import UserError
from reports import export
from reports.export import export_run
from reports.frame import load
from reports.tables import print_table


def shown(run, width=140):
    out = io.StringIO()
    print_table(run, Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


def test_the_table_says_what_was_measured(make):
    text = shown(make("nvidia", repeats=2, steps=6))
    row = next(line for line in text.splitlines() if "megafold" in line)
    assert "2.2" in row and "×" in row and "GiB" in row and " ok" in row
    assert "oom_device" in text
    assert "NVIDIA H200 · driver 570.86.15 · torch 2.13.0" in text
    assert "FIXTURE, not measured" in text
    assert "throttled: the device lowered its clocks" in text
    assert "\x1b" not in text


def test_every_length_and_variant_has_a_row(make):
    run = make("cpu", repeats=1, steps=6)
    text = shown(run)
    assert sum(" ok" in line for line in text.splitlines()) == 8
    assert "host peak" in text


@pytest.mark.parametrize("width", [60, 72, 80, 200])
def test_it_fits_narrow_terminals(make, width):
    text = shown(make("nvidia", repeats=1, steps=6), width)
    rows = text.splitlines()
    body = [r for r in rows if "GiB" in r or "outcome" in r]
    assert body and all(len(row) <= width for row in body)
    assert all(name in text for name in ("pytorch", "inductor", "flex", "megafold"))


def test_a_running_sweep_shows_what_is_there(make):
    run = make("cpu")
    path = run / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["spec"]["seq_lens"] += [192, 256, 384, 512]
    (run / "manifest.json").write_text(json.dumps(manifest))
    spec = manifest["spec"]
    planned = len(spec["variants"]) * len(spec["seq_lens"]) * (spec["repeats"] + 1)
    text = shown(run)
    assert f"47 of {planned} trials so far" in text
    assert "torn" in text
    path.write_text("")
    assert "No trial has ended yet" in shown(run)


def test_markup_in_names_is_not_read_as_markup(make):
    run = make("failed", fails={"pytorch": (384, "crash"), "inductor": (384, "crash")})
    text = (run / "results.jsonl").read_text().replace("could not go on", "bad [red]thing[/red] [/nope]")
    (run / "results.jsonl").write_text(text)
    assert "bad [red]thing[/red] [/nope]" in shown(run)


def test_csv_holds_the_records_numbers(make):
    run = make("cpu", lengths=(32, 64))
    path = export_run(run, "csv")
    assert path == run / "exports" / "trials.csv"
    read = pd.read_csv(path)
    frame = load(run)
    assert list(read["trial_id"]) == list(frame["trial_id"])
    pd.testing.assert_series_equal(
        read["time.step_time_s.median"], frame["time.step_time_s.median"], check_exact=True
    )
    assert len(pd.read_csv(path.with_name("points.csv"))) == 4
    assert len(pd.read_csv(path.with_name("samples.csv"))) == 12 * (20 * 3 + 2)


def test_csv_into_a_named_file(make, tmp_path):
    path = export_run(make("point"), "csv", tmp_path / "sub" / "mine.csv")
    assert path.exists() and path.with_name("mine_points.csv").exists()


def test_json_holds_the_whole_records(make):
    run = make("point")
    content = json.loads(export_run(run, "json").read_text())
    assert content["trials"] == [
        json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()
    ]
    assert content["points"][0]["outcome"] == "ok"


def test_parquet_round_trips(make):
    pytest.importorskip("pyarrow")
    run = make("cpu", lengths=(32,), repeats=1)
    read = pd.read_parquet(export_run(run, "parquet"))
    assert list(read["time.step_time_s.median"].dropna()) == list(
        load(run)["time.step_time_s.median"].dropna()
    )


def test_parquet_without_pyarrow_names_the_extra(make, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"megafold-bench\[parquet\]"):
        export_run(make("point"), "parquet")


def test_unknown_format_and_folder(make, tmp_path):
    run = make("point")
    with pytest.raises(UserError, match="xlsx"):
        export_run(run, "xlsx")
    with pytest.raises(UserError, match="is a folder"):
        export_run(run, "csv", tmp_path)


def test_a_place_that_cannot_be_written(make, tmp_path):
    run = make("point")
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        export_run(run, "csv", blocker / "x.csv")
