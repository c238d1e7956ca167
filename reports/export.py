"""Exports of a run for other programs. Derived, so they may be overwritten; the records never are."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from megafold_bench.errors import UserError
from reports.cells import as_frame, cells
from reports.files import make_folder, write_text
from reports.frame import load_run, samples, trials

FORMATS = ("csv", "json", "parquet")


def export(run_dir: Path, fmt: str = "csv", out: Path | None = None) -> list[Path]:
    """Write ``trials``, ``points`` and ``samples`` of a run in `fmt`; into ``exports/`` unless `out` is given.

    Trials are one row per trial with dotted column names, points one row per series and length,
    samples one row per raw step time. JSON writes them as one file of records, parquet needs pyarrow.
    Raises `UserError` for an unknown format, a missing pyarrow or a folder that cannot be written.
    """
    if fmt not in FORMATS:
        raise UserError(f"unknown export format {fmt!r}: choose from {', '.join(FORMATS)}")
    if fmt == "parquet" and find_spec("pyarrow") is None:
        raise UserError('parquet needs pyarrow: python -m pip install "megafold-bench[parquet]"')
    run = load_run(run_dir)
    folder = make_folder(out or run_dir / "exports")
    if fmt == "json":
        points = as_frame(cells(run.records))
        content = {
            "manifest": run.manifest,
            "trials": list(run.records),
            "points": json.loads(points.to_json(orient="records", double_precision=15)),
        }
        return [write_text(folder / "run.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")]
    frames = {"trials": trials(run), "points": as_frame(cells(run.records)), "samples": samples(run)}
    paths = []
    for name, frame in frames.items():
        path = folder / f"{name}.{fmt}"
        if fmt == "csv":
            write_text(path, frame.to_csv(index=False))
        else:
            _write_parquet(frame, path)
        paths.append(path)
    return paths


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    # A column that mixes texts and numbers (a factor that is "auto" in one variant) has no parquet type.
    mixed = [
        name for name in frame.columns
        if frame[name].dtype == object and len({type(v) for v in frame[name].dropna()}) > 1
    ]  # fmt: skip
    as_text = frame.astype({name: "string" for name in mixed})
    try:
        as_text.to_parquet(path, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
