"""Fake variants on the path of this process and of the workers it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megafold_bench.launchers import LocalLauncher
from megafold_bench.runs import RunFolder
from megafold_bench.sweep import Runner, SweepSpec

FAKES = Path(__file__).resolve().parent.parent / "fakes"


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.trials: list[Any] = []
        self.events: list[Any] = []
        self.records: list[Any] = []

    def on_trial(self, trial: Any, number: int, of: int) -> None:
        self.trials.append(trial)

    def on_event(self, event: Any) -> None:
        self.events.append(event)

    def on_tick(self) -> None:
        pass

    def on_record(self, record: Any) -> None:
        self.records.append(record)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    root = FAKES.parent.parent
    inherited = [part for part in [os.environ.get("PYTHONPATH")] if part]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), str(root), *inherited]))


@pytest.fixture
def listener() -> Quiet:
    return Quiet()


def make_spec(**changes: Any) -> SweepSpec:
    values: dict[str, Any] = {
        "variants": ("fake",),
        "seq_lens": (32,),
        "device": "cpu",
        "steps": 6,
        "warmup": 1,
        "repeats": 1,
        "timeout_s": 20.0,
    }
    return SweepSpec(**values | changes)


@pytest.fixture
def spec() -> Callable[..., SweepSpec]:
    return make_spec


@pytest.fixture
def open_run(tmp_path: Path, fakes: None) -> Iterator[Callable[..., RunFolder]]:
    """Opens ``tmp_path/run`` for a spec; closed at the end of the test."""
    opened: list[RunFolder] = []

    def open_(spec: SweepSpec, resume: bool = False, kind: str = "sweep") -> RunFolder:
        folder = RunFolder.open(
            tmp_path / "run", kind=kind, spec=spec.as_dict(), environment=dict, resume=resume
        )
        opened.append(folder)
        return folder

    yield open_
    for folder in opened:
        folder.close()


@pytest.fixture
def run_one(open_run: Callable[..., RunFolder], listener: Quiet) -> Callable[..., Any]:
    """Runs one trial with the given ending and returns its record."""
    from megafold_bench.sweep import plan

    def run(
        ending: str, timeout_s: float = 20.0, phase: str = "time", cgroup: Path | None = None, **options: Any
    ) -> Any:
        spec = make_spec(options={"ending": ending, **options}, timeout_s=timeout_s)
        launcher = LocalLauncher(grace_s=0.5, cgroup_root=cgroup or Path("/"))
        runner = Runner(open_run(spec), launcher, listener, timeout_s)
        trial = next(trial for trial in plan(spec) if trial.point.phase == phase)
        return runner.run(trial, 1, 1)

    return run
