"""A run folder in memory: its manifest, its valid records, and one table row per trial."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from megafold_bench.records import RESULTS_NAME, Manifest, Record, latest, read_manifest, read_results
from reports.fields import group
from reports.provenance import Provenance

LONG_FIELDS = frozenset({"samples", "warmup_samples", "losses", "ranks", "log_tail"})
"""Fields of a record that have no place in a table cell; exports keep them elsewhere."""


@dataclass(frozen=True)
class Run:
    """One run folder. `records` holds the latest attempt of each trial; `warnings` what could not be read."""

    path: Path
    manifest: Manifest
    records: tuple[Record, ...]
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name, which is what people call a run."""
        return self.path.resolve().name

    @property
    def measures_time(self) -> bool:
        """Whether any trial was to measure time; those of a boundary search measure memory alone."""
        return any(record["factors"]["phase"] == "time" for record in self.records)

    @property
    def provenance(self) -> Provenance:
        """Where the run was measured: of its newest record that has any, with the manifest behind it."""
        newest: Mapping[str, Any] = next(
            (p for p in reversed(self._records_provenance) if p.get("python")), {}
        )
        spec = self.manifest.get("spec") or {}
        asked = spec.get("device") or (spec.get("base") or {}).get("device")
        device = self.records[0]["factors"]["device"] if self.records else asked
        environment = self.manifest.get("environment") or {}
        if self.manifest.get("fixture") and not environment.get("fixture"):
            environment = {**environment, "fixture": "its manifest says so"}
        return Provenance.gather(newest, environment, device or "cuda")

    @property
    def _records_provenance(self) -> list[Mapping[str, Any]]:
        return [r.get("provenance") or {} for r in self.records]

    @property
    def caption(self) -> str:
        """What the run was measured on and with, in one line, whether that changed on the way, and the options asked for."""
        known = self._records_provenance
        devices = {p["device_uuid"] for p in known if p.get("device_uuid")}
        now = self.provenance
        began = (self.manifest.get("environment") or {}).get("source") or {}
        commits = dict.fromkeys(
            replace(now, commit=str(s.get("commit") or ""), dirty=str(s.get("dirty"))).short_commit
            for s in (p.get("source") or began for p in known)
        )
        line = now.caption()
        if len(devices) > 1:
            line += f" · on {len(devices)} devices of this kind, one after another"
        if len(commits) > 1:
            line += f" · trials at commits {', '.join(c or 'unknown' for c in commits)}"
        if self._options:
            line += f" · {self._options}"
        return line

    @property
    def _options(self) -> str:
        """What was set beside the preset and the input, which tables and titles tell: ``offload=true``."""
        spec = self.manifest.get("spec") or {}
        options = (spec.get("base") or spec).get("options") or {}
        told = {
            n: v
            for n, v in options.items()
            if n not in ("preset", "input", "msa", "template") and v is not None
        }
        return ", ".join(f"{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in told.items())


def load_run(run_dir: Path) -> Run:
    """Read a run folder, finished or still being written.

    Lines that cannot be read become `Run.warnings`. Raises `UserError` if `run_dir` is no run folder or
    is of a newer schema.
    """
    manifest = read_manifest(run_dir)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = read_results(run_dir / RESULTS_NAME)
    return Run(run_dir, manifest, tuple(latest(records)), tuple(str(item.message) for item in caught))


def _flatten(value: Mapping[str, Any], prefix: str, row: dict[str, Any]) -> None:
    for key, item in value.items():
        name = f"{prefix}{key}"
        if key in LONG_FIELDS:
            continue
        if isinstance(item, Mapping):
            _flatten(item, f"{name}.", row)
        elif isinstance(item, list | tuple):
            row[name] = ";".join(str(part) for part in item)
        else:
            row[name] = item


def trials(run: Run) -> pd.DataFrame:
    """One row per trial, columns by dotted path into the record (``time.step_time_s.median``), SI units.

    Factors and the outcome lose their prefix where that is clear: ``variant``, ``seq_len_tokens``, ``status``.
    """
    rows = []
    for record in run.records:
        row: dict[str, Any] = {}
        for key, item in record.items():
            if key in LONG_FIELDS:
                continue
            if key in ("factors", "outcome") and isinstance(item, Mapping):
                _flatten(item, "", row)
            elif isinstance(item, Mapping):
                _flatten(item, f"{key}.", row)
            elif isinstance(item, list | tuple):
                row[key] = ";".join(str(part) for part in item)
            else:
                row[key] = item
        rows.append(row)
    return pd.DataFrame(rows)


def samples(run: Run) -> pd.DataFrame:
    """Every raw time sample: one row per trial, quantity and step, in order, warm-up steps marked."""
    rows = []
    for record in run.records:
        time = group(record, "time")
        for warmup, kept in ((True, "warmup_samples"), (False, "samples")):
            for name, values in (time.get(kept) or {}).items():
                for step, value in enumerate(values):
                    rows.append((record["trial_id"], record["factors"]["variant"],
                                 record["factors"]["seq_len_tokens"], name, warmup, step, value))  # fmt: skip
    columns = ["trial_id", "variant", "seq_len_tokens", "quantity", "warmup", "step", "value_s"]
    return pd.DataFrame(rows, columns=columns)


def load(run_dir: Path) -> pd.DataFrame:
    """`trials` of the run folder `run_dir`."""
    return trials(load_run(run_dir))
