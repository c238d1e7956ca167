import json
import re
from itertools import pairwise

import pandas as pd
import pytest

from megafold_bench.errors import UserError
from reports.cells import cells
from reports.figures import plot_run
from reports.figures.canvas import overlapping_texts, spread_apart
from reports.figures.run import draw_run
from reports.figures.save import render
from reports.figures.style import KNOWN, WIDTHS_IN, looks
from reports.frame import load_run
from reports.published import SERIES

QUICK = {"repeats": 2, "steps": 6}


def drawn(run, published=False):
    return {drawing.name: drawing for drawing in draw_run(load_run(run), published)}


def test_files_of_every_format_with_a_csv_beside(make):
    run = make("nvidia", **QUICK)
    paths = plot_run(run)
    names = {path.name for path in paths}
    assert names == {
        f"{f}.{e}"
        for f in ("time", "memory", "throughput", "distribution")
        for e in ("svg", "pdf", "png", "csv")
    }
    assert (run / "figures" / "time.png").read_bytes().startswith(b"\x89PNG")
    pdf = (run / "figures" / "time.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    width = re.search(r"/MediaBox \[ 0 0 ([\d.]+)", pdf.decode("latin1"))
    assert float(width[1]) == pytest.approx(3.35 * 72, abs=0.5)


@pytest.mark.parametrize(("width", "inches"), [("column", 3.35), ("page", 6.9)])
def test_pdf_has_its_fonts_and_svg_its_outlines_at_the_width_of_a_paper(make, width, inches):
    run = make("nvidia", **QUICK)
    for drawing in draw_run(load_run(run), published=True, width_in=WIDTHS_IN[width]):
        pdf = render(drawing, "pdf").decode("latin1")
        fonts = re.findall(r"/Type /Font\b.*?>>", pdf, flags=re.DOTALL)
        kinds = set(re.findall(r"/Subtype /(\w+)", " ".join(fonts)))
        assert fonts and kinds <= {"Type0", "CIDFontType2", "TrueType"}, kinds  # Type 42, no Type 3
        descriptors = re.findall(r"/Type /FontDescriptor.*?>>", pdf, flags=re.DOTALL)
        assert descriptors and all("/FontFile2" in descriptor for descriptor in descriptors)
        box = re.search(r"/MediaBox \[ 0 0 ([\d.]+)", pdf)
        assert float(box[1]) == pytest.approx(inches * 72, abs=0.5)
        svg = render(drawing, "svg").decode()
        assert "<text" not in svg and "font-family" not in svg
        assert float(re.search(r'width="([\d.]+)pt"', svg)[1]) == pytest.approx(inches * 72, abs=0.5)
        assert overlapping_texts(drawing.figure) == [], drawing.name


def test_only_the_formats_asked_for_are_written(make):
    run = make("point", **QUICK)
    names = {path.name for path in plot_run(run, formats=("pdf",))}
    assert names == {
        f"{f}.{e}" for f in ("time", "memory", "throughput", "distribution") for e in ("pdf", "csv")
    }


def test_the_csv_is_what_was_measured(make):
    run = make("single", **QUICK)
    plot_run(run)
    frame = pd.read_csv(run / "figures" / "time.csv")
    found = {c.seq_len: c for c in cells(load_run(run).records)}
    for row in frame.to_dict("records"):
        cell = found[row["seq_len_tokens"]]
        if cell.time:
            assert row["step_time_median_s"] == cell.time.median
            assert row["step_time_ci95_hi_s"] == cell.time.interval.hi
        else:
            assert row["outcome"] == "oom_device"
    memory = pd.read_csv(run / "figures" / "memory.csv").set_index("seq_len_tokens")
    assert memory.loc[512, "reserved_peak_bytes"] == found[512].peak_bytes
    steps = pd.read_csv(run / "figures" / "distribution.csv")
    assert len(steps) == 2 * 6 * 5


def test_the_same_records_give_the_same_bytes(make):
    run = make("cpu", **QUICK)
    first, second = drawn(run), drawn(run)
    for fmt in ("svg", "pdf", "png"):
        assert render(first["time"], fmt) == render(second["time"], fmt)
    assert b"<dc:date>" not in render(first["time"], "svg")


@pytest.mark.parametrize(
    ("kind", "published"),
    [("nvidia", False), ("nvidia", True), ("single", True), ("amd", True), ("cpu", False), ("failed", False), ("point", False), ("many", False)],
)  # fmt: skip
def test_nothing_overlaps_and_nothing_is_cut_off(make, kind, published):
    for name, drawing in drawn(make(kind, **QUICK), published).items():
        assert overlapping_texts(drawing.figure) == [], name


def test_long_names_stay_inside(make):
    run = make("cpu", variants=("pytorch", "my-company-own-$attention$-kernels"), **QUICK)
    for name, drawing in drawn(run).items():
        assert overlapping_texts(drawing.figure) == [], name


def test_axes_start_at_zero_and_hold_every_value(make):
    figures = drawn(make("nvidia", **QUICK))
    for name in ("time", "memory", "throughput"):
        axes = figures[name].figure.axes[0]
        low, high = axes.get_ylim()
        values = [
            y for line in axes.lines if line.get_transform() == axes.transData for y in line.get_ydata()
        ]
        assert low == 0 and max(values) < high
        assert axes.get_xscale() == "log"
        assert list(axes.get_xticks()) == [256, 384, 512, 640, 768, 1024]
    assert max(y for y in figures["memory"].figure.axes[0].get_ylim()) > 140.4


def test_out_of_memory_is_marked_at_the_first_failing_length(make):
    run = make("nvidia", **QUICK)
    for name in ("time", "memory"):
        svg = render(drawn(run)[name], "svg").decode()
        for variant in ("pytorch", "inductor", "flex"):
            assert f'id="oom-{variant}-1024"' in svg
            assert f'id="zone-{variant}-1024"' in svg
        assert "oom-megafold" not in svg
    assert 'id="capacity"' in render(drawn(run)["memory"], "svg").decode()


def test_another_ending_is_marked_differently(make):
    svg = render(drawn(make("failed", **QUICK))["time"], "svg").decode()
    assert 'id="oom-pytorch-384"' in svg and 'id="failed-inductor-384"' in svg


def test_flagged_points_are_hollow(make):
    svg = render(drawn(make("nvidia", repeats=3))["time"], "svg").decode()
    assert 'id="flagged-inductor-512"' in svg and 'id="point-inductor-384"' in svg
    caption = drawn(make("nvidia", name="again", repeats=3))["time"].caption
    assert "Hollow: throttled" in caption


def test_foreign_processes_show_as_hollow_markers_and_footnotes(make):
    run = make("single", quality={("pytorch", 384): ["foreign_process"]}, **QUICK)
    drawing = drawn(run)["memory"]
    svg = render(drawing, "svg").decode()
    assert 'id="flagged-pytorch-384"' in svg and 'id="point-pytorch-256"' in svg
    assert "Hollow: foreign process" in drawing.caption


def test_a_point_under_pressure_is_not_joined_to_the_curve(make):
    run = make("single", lengths=(256, 384, 512), **QUICK)
    text = (run / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in text]
    for record in records:
        if record["factors"]["seq_len_tokens"] == 512:
            record["outcome"]["status"] = "ok_pressure"
    (run / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    figure = drawn(run)["time"].figure
    curve = next(
        line for line in figure.axes[0].lines if len(line.get_xdata()) > 1 and line.get_linewidth() > 1
    )
    assert list(curve.get_xdata()) == [256, 384]
    assert 'id="flagged-pytorch-512"' in render(drawn(run)["time"], "svg").decode()


def test_published_series_are_labelled_and_of_their_own_tier(make):
    run = make("nvidia", **QUICK)
    drawing = drawn(run, published=True)["time"]
    assert "published, H200, La, Gupta" in drawing.caption
    frame = drawing.data
    published = frame[frame["tier"] == "published"]
    mega = published[published["series"] == "MegaFold (published)"].set_index("seq_len_tokens")
    assert mega.loc[768, "step_time_median_s"] == 17.80
    assert set(frame[frame["tier"] == "measured"]["series"]) == {"pytorch", "inductor", "flex", "megafold"}
    assert 'id="published-MegaFold-published' in render(drawing, "svg").decode()


def test_published_memory_is_said_to_be_allocated(make):
    run = make("single", **QUICK)
    ours, both = drawn(run)["memory"], drawn(run, published=True)["memory"]
    assert "published is peak allocated memory of another implementation" in both.caption
    assert "allocated memory of another" not in ours.caption
    assert ours.figure.axes[0].get_ylabel() == "peak reserved (GiB)"
    assert both.figure.axes[0].get_ylabel() == "peak memory (GiB)"
    frame = both.data
    published = frame[frame["tier"] == "published"]
    assert published["allocated_peak_bytes"].notna().all() and published["reserved_peak_bytes"].isna().all()


def test_flags_of_points_that_are_not_drawn_are_not_in_the_caption(make):
    run = make("single", quality={("pytorch", 1024): ["throttled"]}, **QUICK)  # 1024 ran out of memory
    assert "Hollow" not in drawn(run)["time"].caption


def test_one_step_is_a_dot_on_a_range_of_a_per_cent(make):
    axes = drawn(make("point", repeats=1, steps=1))["distribution"].figure.axes[0]
    assert axes.get_ylim() == (-1.0, 1.0)


def test_published_ratios_are_those_of_the_paper():
    h200 = {s.system: s for s in SERIES if s.device == "H200"}
    assert h200["PyTorch"].allocated_peak_bytes[512] / h200["MegaFold"].allocated_peak_bytes[
        512
    ] == pytest.approx(1.229, abs=1e-3)
    assert h200["PyTorch"].step_time_s[512] / h200["MegaFold"].step_time_s[512] == pytest.approx(
        1.73, abs=0.01
    )


def test_looks_are_fixed_and_all_different():
    names = ["pytorch", "megafold", *(f"other-{i}" for i in range(9))]
    chosen = looks(names)
    assert chosen["pytorch"] == looks(["pytorch", "inductor"])["pytorch"] == KNOWN["pytorch"]
    assert len({(look.colour, look.marker) for look in chosen.values()}) == len(names)


def test_known_looks_differ_without_colour():
    assert len({look.marker for look in KNOWN.values()}) == len(KNOWN)


def test_spread_apart_keeps_order_distance_and_limits():
    placed = spread_apart([5, 5.1, 5.2, 50], 8, 4, 100)
    assert placed == sorted(placed)
    assert all(b - a >= 8 - 1e-9 for a, b in pairwise(placed))
    assert placed[0] >= 4 and placed[3] == 50


def test_captions_tell_where(make):
    caption = drawn(make("amd", **QUICK))["memory"].caption
    for words in ("AMD Instinct MI250X", "driver 6.14.14", "torch 2.13.0", "commit 0123456"):
        assert words in caption


def test_a_run_without_records_is_a_user_error(make):
    run = make("point")
    (run / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="no record yet"):
        plot_run(run)
