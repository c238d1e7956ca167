"""Everything can be drawn from the recorded runs that are shipped: real ones of an NVIDIA card, and a fixture
in the shape of an AMD one, which nothing may take for a measurement."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from megafold_bench.records import read_manifest
from reports.cells import cells
from reports.compare import compare
from reports.compare_table import print_comparison
from reports.export import export_run
from reports.figures.canvas import overlapping_texts
from reports.figures.comparison import comparison_drawing
from reports.figures.run import draw_run
from reports.figures.save import render
from reports.figures.style import WIDTHS_IN
from reports.frame import load_run
from reports.html import write_report
from reports.tables import print_table
from tests.fixtures.make_amd_shaped import make

ROOT = Path(__file__).resolve().parents[2]
REAL = [
    ROOT / "reports" / "reference" / name
    for name in (
        "h200-7a4d",
        "h200-lengths",
        "h200-long",
        "h200-ladder",
        "h200-ladder-inductor",
        "h200-steps-megafold",
        "h200-boundary",
        "h200-boundary-40gib",
    )
]
AMD = ROOT / "tests" / "fixtures" / "amd-shaped"
NAMES = [run.name for run in (*REAL, AMD)]


def lines(run) -> list:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def printed(show, *arguments) -> str:
    console = Console(file=io.StringIO(), width=140)
    show(*arguments, console)
    return console.file.getvalue()


@pytest.mark.parametrize("run", [*REAL, AMD], ids=NAMES)
@pytest.mark.parametrize("width", WIDTHS_IN)
@pytest.mark.parametrize("published", [False, True])
def test_figures(run, width, published):
    for drawing in draw_run(load_run(run), published, WIDTHS_IN[width]):
        assert overlapping_texts(drawing.figure) == [], drawing.name
        assert render(drawing, "pdf").startswith(b"%PDF")
        if drawing.name != "distribution":
            assert drawing.figure.axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize("run", [*REAL, AMD], ids=NAMES)
def test_table_and_export(run, tmp_path):
    text = printed(print_table, run)
    for cell in cells(load_run(run).records):
        assert cell.series in text and cell.outcome.value in text
    copy = shutil.copytree(run, tmp_path / run.name)
    assert export_run(copy, "csv", None).stat().st_size > 1000


@pytest.mark.parametrize("run", [*REAL, AMD], ids=NAMES)
def test_report(run, tmp_path):
    page = write_report([run], tmp_path / "report.html", published=True).read_text()
    figures = {drawing.name for drawing in draw_run(load_run(run))}
    assert "memory" in figures and page.count("<svg") >= len(figures)
    assert ("FIXTURE, not measured" in page) is (run is AMD)


def test_a_boundary_search_shows_its_ends_and_no_empty_figure(tmp_path):
    """Both are confirmed, on two machines; with its last repeats cut off, the end of `inductor` would not be."""
    run = REAL[-1]
    text = printed(print_table, run)
    assert "commit ac69806 · on 2 devices of this kind, one after another" in text
    assert (
        "pytorch at 40 GiB (capacity_emulated): max_ok 864, min_fail 896, granularity 32, 6 trials\n" in text
    )
    inductor = "inductor at 40 GiB (capacity_emulated): max_ok 896, min_fail 928, granularity 32, "
    assert inductor + "7 trials, under allocator pressure from 864" in text and "not confirmed" not in text
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    lines = (cut / "results.jsonl").read_text().splitlines()
    (cut / "results.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    assert inductor + "4 trials, not" in printed(print_table, cut)
    (drawing,) = draw_run(load_run(run))
    assert drawing.name == "memory"
    (rule,) = [t for t in drawing.figure.axes[0].texts if t.get_text() == "capacity 40.0 GiB"]
    assert rule.get_ha() == "right"  # at the left it would lie on the first points
    assert "No trial of this run was to measure time." in write_report([run], tmp_path / "r.html").read_text()


def test_the_two_vendors_compare(tmp_path):
    comparison = compare(REAL[1], AMD, by="gpu")
    assert [pair.a.seq_len for pair in comparison.pairs] == [256, 512, 768]
    assert all(pair.time and pair.memory and pair.energy for pair in comparison.pairs)
    assert ("vendor", "nvidia", "amd") in comparison.differences
    text = printed(print_comparison, comparison)
    assert "NVIDIA H200 → AMD Instinct MI250X" in text and "made up in the shape" in text
    drawing = comparison_drawing(comparison)
    assert overlapping_texts(drawing.figure) == [] and "FIXTURE" in drawing.caption
    page = write_report([REAL[1], AMD], tmp_path / "report.html").read_text()
    assert "amd-shaped against h200-lengths, by gpu" in page


def test_a_fixture_is_marked_everywhere_and_kept_apart(tmp_path):
    assert read_manifest(AMD)["fixture"] is True
    assert all(record["provenance"]["fixture"] for record in lines(AMD))
    for drawing in draw_run(load_run(AMD)):
        assert drawing.caption.startswith("FIXTURE, not measured")
    for run in REAL:
        assert "fixture" not in read_manifest(run)
        assert "fixture" not in (run / "results.jsonl").read_text()
    # The mark in the manifest is enough.
    copy = shutil.copytree(AMD, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["environment"]["fixture"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    records = lines(copy)
    for record in records:
        del record["provenance"]["fixture"]
    (copy / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert load_run(copy).provenance.caption().startswith("FIXTURE, not measured: its manifest says so")


def test_the_fixture_has_what_an_amd_card_shows():
    found = {(cell.series, cell.seq_len): cell for cell in cells(load_run(AMD).records)}
    assert found["pytorch", 1280].outcome.value == "oom_device"
    assert found["inductor", 1280].outcome.value == "kernel_resource"
    assert found["pytorch", 1024].outcome.value == "ok_pressure"
    flags = {flag for cell in found.values() for flag in cell.flags}
    assert flags == {"allocator_retries", "foreign_process", "throttled", "unsteady"}
    records = [record for record in load_run(AMD).records if record["telemetry"]]
    assert all(r["telemetry"]["selector"].startswith("amd:") for r in records)
    reasons = records[0]["telemetry"]["unavailable"]
    assert reasons["link_rx_bytes"] == "link counter: AMD SMI does not tell received from sent"


def test_the_fixture_is_what_its_maker_makes(tmp_path):
    again = make(tmp_path / "again")
    assert json.loads((again / "manifest.json").read_text()) == json.loads(
        (AMD / "manifest.json").read_text()
    )

    def shape(run):
        return [
            (r["trial_id"], r["outcome"]["status"], r["quality"], sorted(r["telemetry"])) for r in lines(run)
        ]

    assert shape(again) == shape(AMD)
