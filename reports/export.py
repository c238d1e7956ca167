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


def export_run(run_dir: Path, fmt: str = "csv", out: Path | None = None) -> Path:
    """Write the trials of a run in `fmt` to the file `out`, by default in the run's ``exports``.

    CSV and parquet hold one row per trial with dotted column names; beside the file stand ``…_points``
    (a row for each series and length) and ``…_samples`` (one for each raw step time). JSON holds the
    manifest, the whole records and the points in one file. Returns the path of the main file. Raises
    `UserError` for an unknown format, a missing pyarrow or a place that cannot be written.
    """
    if fmt not in FORMATS:
        raise UserError(f"unknown export format {fmt!r}: choose from {', '.join(FORMATS)}")
    if fmt == "parquet" and find_spec("pyarrow") is None:
        raise UserError('parquet needs pyarrow: python -m pip install "megafold-bench[parquet]"')
    run = load_run(run_dir)
    path = out or run_dir / "exports" / f"trials.{fmt}"
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file, such as {path / f'trials.{fmt}'}")
    make_folder(path.parent)
    points = as_frame(cells(run.records))
    if fmt == "json":
        content = {
            "manifest": run.manifest,
            "trials": list(run.records),
            "points": json.loads(points.to_json(orient="records", double_precision=15)),
        }
        return write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    stem = "" if out is None else f"{path.stem}_"
    beside = {"points": points, "samples": samples(run)}
    targets = {
        path: trials(run),
        **{path.with_name(f"{stem}{name}{path.suffix}"): f for name, f in beside.items()},
    }
    for target, frame in targets.items():
        if fmt == "csv":
            write_text(target, frame.to_csv(index=False))
        else:
            _write_parquet(frame, target)
    return path


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    # A column that mixes texts and numbers (a factor that is "auto" in one variant) has no parquet type.
    mixed = [
        name for name in frame.columns
        if frame[name].dtype == object and len({type(v) for v in frame[name].dropna()}) > 1
    ]  # fmt: skip
    as_text = frame.astype(dict.fromkeys(mixed, "string"))
    try:
        as_text.to_parquet(path, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
