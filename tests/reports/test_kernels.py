import io
import json

import pytest
from matplotlib.text import Text
from rich.console import Console

from megafold_bench.errors import UserError
from reports.figures.canvas import overlapping_texts
from reports.figures.kernels import kernels_drawing, save_kernels_figure
from reports.kernel_rows import floor_of, kernel_frame, read_rows
from reports.kernel_table import print_kernels, save_kernels_csv

CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": {"bf16": 8e14}, "exps_per_s": 4e12}


def measurement(op, tokens, implementation, ms, run="r", **changes):
    passes = {
        name: {"times_s": [ms * f * 1e-3 * k for k in (0.98, 1.0, 1.05)]}
        for name, f in (("fwd", 1), ("fwdbwd", 4))
    }
    cost = {"flops": 4e9 * tokens, "bytes": 1e6 * tokens, "exps": 1e7 * tokens}
    row = {
        "schema_version": 1, "kind": "measurement", "run": run, "time": "t", "op": op, "dtype": "bf16", "tokens": tokens,
        "implementation": implementation, "device": "cuda", "outcome": "ok", "detail": "", "passes": passes,
        "memory": {"fwd": 2**20, "fwdbwd": 2**25}, "kernels_s": {"fwd": 9e-5, "fwdbwd": 4e-4}, "cost": {"fwd": cost, "fwdbwd": cost}, "versions": {},
        "bitwise": {"repeats": 5, "differing": ["d_bias"] if implementation == "flex" else []},
        "errors": {"tokens": 200, "own": {"out": 0.002, "d_q": 0.004}, "definition": {"out": 0.004, "d_q": 0.003}},
    }  # fmt: skip
    return row | changes


def failure(op, tokens, implementation):
    return {
        "schema_version": 1, "kind": "measurement", "run": "r", "time": "t", "op": op, "dtype": "bf16", "tokens": tokens,
        "implementation": implementation, "device": "cuda", "outcome": "oom_device", "detail": "CUDA out of memory",
        "passes": ["fwd", "fwdbwd"],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"kind": "environment", "run": "r", "environment": {"gpus": [{"name": "Fake H200", "driver": "1.2"}]}}
    ]
    rows.append({"kind": "ceilings", "run": "r", "outcome": "ok", "device": "cuda", **CEILINGS})
    for op in ("triangle_attention", "transition"):
        for tokens in (384, 768):
            for implementation, ms in (("definition", 3), ("flex", 0.2), ("megafold", 0.15)):
                rows.append(measurement(op, tokens, implementation, ms * (tokens / 384) ** 3))
    rows[-3] = failure("transition", 768, "definition")
    (tmp_path / "kernels.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "meas')
    return tmp_path


def test_the_floor_is_the_slowest_resource():
    floor, bound = floor_of({"flops": 8e14, "bytes": 4e12, "exps": 8e12}, CEILINGS, "bf16")
    assert (floor, bound) == (2.0, "exponentials")
    assert floor_of({"flops": 1, "bytes": 1, "exps": 1}, CEILINGS, "fp32") == (None, "")


def test_frame(folder):
    frame = kernel_frame(read_rows(folder))
    assert len(frame) == 24
    line = frame[
        (frame["implementation"] == "flex") & (frame["tokens"] == 384) & (frame["pass"] == "fwd")
    ].iloc[0]
    assert line["median_s"] == pytest.approx(2e-4)
    assert line["p20_s"] < line["median_s"] < line["p80_s"]
    assert line["error_of"] == "d_q" and line["error_ratio"] == pytest.approx(4 / 3)
    assert not line["bitwise"] and line["differing"] == "d_bias"
    assert line["bound_by"] == "matrix FLOPs"
    assert line["times_floor"] == pytest.approx(2e-4 / (384 * 4e9 / 8e14))
    assert frame["outcome"].eq("oom_device").sum() == 2


def test_the_last_run_of_a_point_counts(folder):
    with (folder / "kernels.jsonl").open("a") as file:
        file.write("\n" + json.dumps(measurement("transition", 384, "flex", 9.0, run="later")) + "\n")
    frame = kernel_frame(read_rows(folder))
    line = frame[
        (frame["op"] == "transition") & (frame["implementation"] == "flex") & (frame["tokens"] == 384)
    ]
    assert set(line["run"]) == {"later"} and line["times_floor"].isna().all()


def test_an_error_that_is_not_a_number_is_the_worst(folder):
    errors = {"tokens": 200, "own": {"out": float("nan")}, "definition": {"out": 0.1}}
    frame = kernel_frame([measurement("transition", 8, "flex", 1.0, errors=errors)])
    assert frame["error_ratio"].iloc[0] == float("inf")


def test_table_and_csv(folder):
    console = Console(width=150, record=True, file=io.StringIO())
    print_kernels(folder, console)
    text = console.export_text()
    assert "Fake H200" in text and "triangle_attention · N = 768 · bf16" in text
    assert "200 µs (5.8 %)" in text or "200 µs" in text
    assert "no: d_bias" in text and "1.33× (d_q)" in text and "32 MiB" in text
    assert "definition: oom_device: CUDA out of memory" in text
    assert len(save_kernels_csv(folder).read_text().splitlines()) == 25


def test_a_table_in_a_file_is_not_cut(folder):
    """A console that is no terminal is 80 columns wide, whatever it is told for one table."""
    file = io.StringIO()
    print_kernels(folder, Console(file=file))
    lines = file.getvalue().splitlines()
    header = next(line for line in lines if line.startswith("implementation"))
    assert header.split() == (
        "implementation forward kernels × floor forward + backward kernels × floor peak error bitwise".split()
    )
    row = next(line for line in lines if line.startswith("megafold"))
    assert "150 µs" in row and " 90" in row and "400 µs" in row and "…" not in row


def test_rows_from_before_the_kernels_were_timed_apart(folder):
    rows = [{k: v for k, v in row.items() if k != "kernels_s"} for row in read_rows(folder)]
    (folder / "kernels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = io.StringIO()
    print_kernels(folder, Console(file=file))
    header = next(line for line in file.getvalue().splitlines() if line.startswith("implementation"))
    assert "kernels" not in header


def test_figure(folder):
    drawing = kernels_drawing(folder)
    assert overlapping_texts(drawing.figure) == []
    assert "Fake H200" in drawing.caption
    axes = drawing.figure.axes[0]
    assert {"1", "10", "100"} <= {label.get_text() for label in axes.get_yticklabels()}
    assert [path.suffix for path in save_kernels_figure(folder)] == [".svg", ".pdf", ".png", ".csv"]


def test_a_long_title_stays_inside_the_figure(tmp_path):
    row = measurement("triangle_multiplication_outgoing", 384, "cuequivariance", 1.0)
    (tmp_path / "kernels.jsonl").write_text(json.dumps(row) + "\n")
    figure = kernels_drawing(tmp_path).figure
    figure.set_dpi(300)  # as it is saved
    figure.draw_without_rendering()
    [title] = [text for text in figure.findobj(Text) if text.get_text().startswith("triangle")]
    box = title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_folders_without_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no kernels\.jsonl"):
        read_rows(tmp_path)
    (tmp_path / "kernels.jsonl").write_text(json.dumps(failure("transition", 8, "flex")) + "\n")
    with pytest.raises(UserError, match="nothing to draw"):
        kernels_drawing(tmp_path)
