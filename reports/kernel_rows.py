"""Rows of `kernels.jsonl` as one flat frame: a line for each operator, length, dtype, implementation and pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megafold_bench.errors import UserError
from reports.provenance import Provenance

ROWS_NAME = "kernels.jsonl"
KEY = ["op", "dtype", "tokens", "implementation"]
COLUMNS = [
    *KEY, "pass", "outcome", "detail", "median_s", "p20_s", "p80_s", "n_samples", "kernels_s", "floor_s", "bound_by", "times_floor",
    "peak_bytes", "error", "error_ratio", "error_of", "error_tokens", "bitwise", "differing", "versions", "run", "time",
    "device", "driver", "torch", "triton", "commit",
]  # fmt: skip
ERROR_FLOOR = 2e-6
"""Below this a relative error is rounding in fp32, whatever the definition's."""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder; UserError if it has none. A line cut off by a crash is left out."""
    path = folder / ROWS_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} has no {ROWS_NAME}: name a folder written by `megafold-bench kernels --out`"
        )
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def floor_of(cost: Mapping[str, float], ceilings: Mapping[str, Any], dtype: str) -> tuple[float | None, str]:
    """The least time the counted work can take, and what bounds it; None where no ceilings were measured."""
    peak = (ceilings.get("matmul_flops_per_s") or {}).get(dtype)
    if not peak:
        return None, ""
    times = {
        "bytes": cost["bytes"] / ceilings["copy_bytes_per_s"],
        "matrix FLOPs": cost["flops"] / peak,
        "exponentials": cost["exps"] / ceilings["exps_per_s"],
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def worst_error(errors: Mapping[str, Any]) -> dict[str, Any]:
    """The output or gradient whose error is the largest multiple of the definition's."""
    own, definition = errors["own"], errors["definition"]
    ratios = {name: _nan_is_worst(own[name] / max(definition[name], ERROR_FLOOR)) for name in own}
    worst = max(ratios, key=lambda name: ratios[name])
    return {
        "error": own[worst],
        "error_ratio": ratios[worst],
        "error_of": worst,
        "error_tokens": errors["tokens"],
    }


def _nan_is_worst(ratio: float) -> float:
    return float("inf") if np.isnan(ratio) else ratio


def kernel_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """All measurements; of several of one point the last run's. Medians and percentiles of the stored samples."""
    environments: dict[str, Mapping[str, Any]] = {}
    ceilings: dict[str, Mapping[str, Any]] = {}
    last: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if row["kind"] == "environment":
            environments[row["run"]] = row["environment"]
        elif row["kind"] == "ceilings":
            ceilings[row["run"]] = row
        elif row["kind"] == "measurement":
            last[tuple(row[name] for name in KEY)] = row
    lines: list[dict[str, Any]] = []
    for row in last.values():
        lines += _lines(row, environments.get(row["run"], {}), ceilings.get(row["run"], {}))
    return pd.DataFrame(lines, columns=COLUMNS)


def _lines(
    row: Mapping[str, Any], environment: Mapping[str, Any], ceilings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    facts = Provenance.gather({}, environment, row["device"])
    shared = {name: row[name] for name in (*KEY, "outcome", "detail", "run", "time")} | {
        "device": facts.device,
        "driver": facts.driver,
        "torch": facts.torch,
        "triton": facts.triton,
        "commit": facts.short_commit,
    }
    if row["outcome"] != "ok":
        return [{**shared, "pass": name} for name in row["passes"]]
    shared |= worst_error(row["errors"])
    shared["bitwise"] = not row["bitwise"]["differing"]
    shared["differing"] = " ".join(row["bitwise"]["differing"])
    shared["versions"] = " ".join(f"{name}={version}" for name, version in row["versions"].items())
    return [
        {
            **shared,
            "pass": name,
            **_timed(row, name, ceilings),
            "kernels_s": row.get("kernels_s", {}).get(name),
            "peak_bytes": row["memory"].get(name),
        }
        for name in row["passes"]
    ]


def _timed(row: Mapping[str, Any], name: str, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    times = np.asarray(row["passes"][name]["times_s"])
    median = float(np.median(times))
    floor, bound = floor_of(row["cost"][name], ceilings, row["dtype"])
    return {
        "median_s": median,
        "p20_s": float(np.percentile(times, 20)),
        "p80_s": float(np.percentile(times, 80)),
        "n_samples": times.size,
        "floor_s": floor,
        "bound_by": bound,
        "times_floor": median / floor if floor else None,
    }


def caption_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Where the last run was measured, in a line."""
    found = [row for row in rows if row["kind"] == "environment"]
    on_gpu = any(row.get("device") == "cuda" for row in rows)
    if not found:
        return "no provenance recorded"
    return Provenance.gather({}, found[-1]["environment"], "cuda" if on_gpu else "cpu").caption()
