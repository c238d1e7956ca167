"""Made-up run folders for the tests of reports: never shipped, and marked as fixtures in their provenance."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megafold_bench import statistics
from megafold_bench.points import canonical_id
from megafold_bench.statistics import summarise
from reports import cells, compare

GIB = 1 << 30
LENGTHS = (256, 384, 512, 640, 768)
NVIDIA = {
    "vendor": "nvidia",
    "name": "NVIDIA H200",
    "uuid": "GPU-00000000-fixture",
    "driver": "570.86.15",
    "total_bytes": 150_754_820_096,
}
AMD = {
    "vendor": "amd",
    "name": "AMD Instinct MI250X",
    "uuid": "amd-fixture",
    "driver": "6.14.14",
    "total_bytes": 64 * GIB,
}
CPU: dict[str, Any] = {"vendor": "cpu", "name": "Fixture CPU @ 2.5 GHz"}
SPEED = {"pytorch": 1.0, "inductor": 0.82, "megafold": 0.45, "flex": 0.74}
MEMORY = {"pytorch": 1.0, "inductor": 0.93, "megafold": 0.46, "flex": 0.71}


@dataclass(frozen=True)
class Spec:
    """What a made-up run holds."""

    variants: tuple[str, ...] = ("pytorch",)
    lengths: tuple[int, ...] = LENGTHS
    machine: dict[str, Any] = field(default_factory=lambda: NVIDIA)
    repeats: int = 3
    steps: int = 20
    seed: int = 0
    slowdown: float = 1.0
    noise: float = 0.01
    bytes_at_512: float = 52 * GIB
    fails: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Variant → first failing length and how it fails; without one it fails where memory ends."""
    quality: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    host: str = "fixture-host"
    log_tail: str = "torch.OutOfMemoryError: HIP out of memory"
    preset: str = "af3"
    name: str = "run"

    @property
    def device(self) -> str:
        return "cpu" if self.machine["vendor"] == "cpu" else "cuda"


def _scale(variant: str, table: dict[str, float]) -> float:
    return table.get(variant, 0.6 + (sum(map(ord, variant)) % 60) / 100)


def provenance(spec: Spec) -> dict[str, Any]:
    """Of a record."""
    facts = {
        "python": "3.12.3",
        "torch": "2.13.0",
        "triton": "3.6.0",
        "fixture": "made up by the tests of reports",
    }
    return facts if spec.device == "cpu" else {**facts, "device_name": spec.machine["name"]}


def environment(spec: Spec) -> dict[str, Any]:
    """Of a manifest, as `megafold_bench.environment.collect` shapes it."""
    return {
        "gpus": [] if spec.device == "cpu" else [spec.machine],
        "software": {"torch": {"version": "2.13.0", "cuda": "13.0", "hip": None}, "triton": "3.6.0"},
        "source": {"version": "0.1.0", "commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "cpu": {"model": "Fixture CPU @ 2.5 GHz"}, "host": {"name_hash": spec.host, "system": "Linux"},
        "variables": {"OMP_NUM_THREADS": "8"}, "fixture": "made up by the tests of reports", "unavailable": {},
    }  # fmt: skip


def peak_bytes(spec: Spec, variant: str, length: int) -> int:
    fixed = 6 * GIB if spec.device == "cuda" else GIB // 2
    grown = (spec.bytes_at_512 - fixed) * (length / 512) ** 2 * _scale(variant, MEMORY)
    return int(fixed + grown)


def status_of(spec: Spec, variant: str, length: int) -> str:
    if variant in spec.fails:
        first, status = spec.fails[variant]
        return status if length >= first else "ok"
    total = spec.machine.get("total_bytes")
    return "oom_device" if total and peak_bytes(spec, variant, length) > total else "ok"


def _time(spec: Spec, variant: str, length: int, rng: np.random.Generator) -> dict[str, Any]:
    base = 0.4 + 6.0 * (length / 512) ** 1.8 if spec.device == "cuda" else 0.02 + 0.2 * (length / 512) ** 2
    median = base * _scale(variant, SPEED) * spec.slowdown
    steps = (median * rng.normal(1, spec.noise / 3) * rng.normal(1, spec.noise, spec.steps)).tolist()
    waits = [0.02 * step for step in steps]
    samples = {"step_time_s": steps, "data_wait_s": waits, "h2d_s": [0.001] * len(steps)}
    summary = summarise(steps).as_dict()
    return {
        "step_time_s": summary, "gpu_step_time_s": None, "data_wait_s": summarise(waits).as_dict(),
        "h2d_s": summarise(samples["h2d_s"]).as_dict(), "enqueue_s": None, "samples": samples,
        "warmup_samples": {"step_time_s": [2 * median, median]}, "warmup_steps": 2, "steady_from_step": 2,
        "build_s": 3.0, "first_step_s": 2 * median, "compile_s": median,
        "throughput_tokens_per_s": length / summary["median"], "samples_per_s": 1 / summary["median"],
    }  # fmt: skip


def _memory(spec: Spec, variant: str, length: int) -> dict[str, Any]:
    peak = peak_bytes(spec, variant, length)
    if spec.device == "cpu":
        return {"host_rss_peak_bytes": peak, "host_rss_baseline_bytes": GIB // 4, "steps": 4, "ranks": []}
    total = spec.machine["total_bytes"]
    return {
        "allocated_peak_bytes": int(peak * 0.93), "reserved_peak_bytes": peak, "requested_peak_bytes": int(peak * 0.92),
        "device_used_peak_bytes": min(total, peak + int(1.3 * GIB)), "device_total_bytes": total,
        "non_torch_bytes": int(1.3 * GIB), "host_rss_peak_bytes": 5 * GIB, "alloc_retries": 0, "ranks": [], "steps": 4,
    }  # fmt: skip


def _record(spec: Spec, variant: str, length: int, phase: str, repeat: int) -> dict[str, Any]:
    rng = np.random.default_rng([spec.seed, sum(map(ord, variant)), length, repeat])
    factors = {
        "variant": variant, "seq_len_tokens": length, "phase": phase, "device": spec.device, "seed": 0,
        "steps": spec.steps, "warmup_steps": 2, "world_size": 1, "world_size_emulated": None,
        "capacity_emulated_bytes": None, "alloc_conf": None, "workload": {"preset": spec.preset, "cycles": 4},
    }  # fmt: skip
    status = status_of(spec, variant, length)
    fine = status in ("ok", "ok_pressure")
    point = canonical_id(factors)
    time = _time(spec, variant, length, rng) if fine and phase == "time" else None
    return {
        "schema_version": 1, "run_id": "fixture", "point_id": point, "case_id": point[:8],
        "trial_id": f"{point}-{repeat}", "repeat": repeat, "attempt": 1, "tier": "measured",
        "started_at": "2026-11-01T10:00:00Z", "ended_at": "2026-11-01T10:01:00Z", "wall_s": 60.0,
        "factors": factors, "time": time,
        "memory": _memory(spec, variant, length) if fine and phase == "memory" else None,
        "outcome": {
            "status": status, "status_detail": "" if fine else f"{status}: could not go on",
            "exit_code": 0, "signal": None, "failing_rank": None, "failing_step": None,
            "exception_type": None, "oom": None, "log_tail": None if fine else spec.log_tail,
        },
        "telemetry": {"energy": {"energy_j": 400.0 * sum(time["samples"]["step_time_s"]), "method": "counter", "valid": True}} if time and spec.device != "cpu" else None,
        "losses": [1.0, 0.9], "facts": {"n_atoms": 8 * length, "parameters": 368_000_000},
        "provenance": provenance(spec), "quality": spec.quality.get((variant, length), []) if phase == "time" else [],
        "unavailable": {},
    }  # fmt: skip


def make_run(folder: Path, spec: Spec) -> Path:
    run = folder / spec.name
    run.mkdir(parents=True)
    records = [
        _record(spec, variant, length, phase, repeat)
        for length in spec.lengths
        for repeat in range(spec.repeats)
        for variant in spec.variants
        for phase in ("time", "memory")
    ]
    manifest = {
        "schema_version": 1, "run_id": "fixture", "kind": "sweep", "created_at": "2026-11-01T10:00:00Z",
        "spec": {"variants": list(spec.variants), "seq_lens": list(spec.lengths), "options": {"preset": spec.preset},
                 "device": spec.device, "repeats": spec.repeats, "steps": spec.steps, "seed": 0},
        "argv": ["megafold-bench", "sweep", "--variants", ",".join(spec.variants)],
        "environment": environment(spec),
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


SPECS = {
    "nvidia": Spec(("pytorch", "inductor", "flex", "megafold"), (256, 384, 512, 640, 768, 1024), bytes_at_512=62 * GIB,
                   quality={("inductor", 512): ["throttled"]}),
    "single": Spec(bytes_at_512=62 * GIB, lengths=(256, 384, 512, 640, 768, 1024)),
    "amd": Spec(("pytorch", "megafold"), (128, 256, 384, 448), AMD, bytes_at_512=80 * GIB),
    "cpu": Spec(("pytorch", "inductor"), (32, 64, 96, 128), CPU, bytes_at_512=4 * GIB, preset="tiny"),
    "failed": Spec(("pytorch", "inductor"), (384, 512),
                   fails={"pytorch": (384, "oom_device"), "inductor": (384, "crash")}),
    "point": Spec(lengths=(384,), repeats=1),
    "many": Spec(tuple(f"variant-{letter}" for letter in "abcdefgh"), noise=0.05),
}  # fmt: skip


def tear(run: Path) -> Path:
    """Cut the last line in two, as a power cut does."""
    path = run / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-400])
    return run


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make("nvidia", slowdown=1.05) → a run folder."""

    def _make(kind: str, **changes: Any) -> Path:
        spec = replace(SPECS[kind], **{"name": kind, **changes})
        return make_run(tmp_path, spec)

    return _make


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    """The interval's last digit is not what these tests look at; the time they take is."""
    monkeypatch.setattr(
        cells, "hierarchical_interval", partial(statistics.hierarchical_interval, resamples=150)
    )
    monkeypatch.setattr(compare, "ratio_of_medians", partial(statistics.ratio_of_medians, resamples=300))


@pytest.fixture(autouse=True)
def _strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
