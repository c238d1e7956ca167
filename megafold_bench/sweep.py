"""Which trials, in which order, and running those that have no record yet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from megafold_bench import variants
from megafold_bench.errors import UserError
from megafold_bench.finish import finish
from megafold_bench.host import own_source
from megafold_bench.launchers import Event, Launched, Launcher
from megafold_bench.measure.memory import MIN_STEPS
from megafold_bench.outcomes import Outcome, Verdict, complete, signal_name
from megafold_bench.points import Phase, Point, Trial
from megafold_bench.records import Record, jsonable, latest
from megafold_bench.runs import RunFolder, remove_with_halves
from megafold_bench.trials import WorkerRequest, blank_record, utc_now
from megafold_bench.variants import Scalar

SAMPLE_INTERVAL_S = 0.05
"""Interval of the device sampler beside a trial."""

MEMORY_WARMUP = 0
DOMINATED_AFTER = 2
"""Lengths that must have failed for want of memory before longer ones are skipped."""


@dataclass(frozen=True)
class SweepSpec:
    """What a sweep was asked for. Two equal specs ask for the same trials."""

    variants: tuple[str, ...]
    seq_lens: tuple[int, ...]
    device: str
    options: Mapping[str, Scalar] = field(default_factory=dict)
    """Passed to each variant's ``resolve``: preset, input, cycles, precision…"""
    steps: int = 20
    warmup: int = 3
    repeats: int = 3
    seed: int = 0
    timeout_s: float = 600.0
    alloc_conf: str | None = None
    sampler: bool = True
    """Whether the device is watched beside each trial."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: choose cpu or cuda")
        if not self.variants:
            raise UserError("no variant named: give at least one to --variants")
        twice = sorted({name for name in self.variants if self.variants.count(name) > 1})
        if twice:
            raise UserError(f"variant {twice[0]!r} is named twice in --variants: name it once")
        for name, least in (("steps", 1), ("warmup", 1), ("repeats", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: must be below 2^32")
        if not self.timeout_s > 0:
            raise UserError(f"--timeout {self.timeout_s:g}: must be a positive number of seconds")

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        fields = asdict(replace(self, options=dict(self.options)))
        if self.sampler:
            del fields["sampler"]  # as in manifests from before there was a choice
        return fields

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepSpec:
        """The spec of a manifest."""
        fields = dict(values)
        return cls(**fields | {name: tuple(fields[name]) for name in ("variants", "seq_lens")})


def parse_seq_lens(text: str) -> tuple[int, ...]:
    """Lengths from ``"64:256:64"`` (first, last, step; the last one included) or ``"384,512"``, ascending.

    Raises `UserError` for anything else.
    """
    remedy = 'write "128,256,384" or "first:last:step"'
    lengths: set[int] = set()
    for part in text.split(","):
        try:
            numbers = [int(number) for number in part.split(":")]
        except ValueError:
            raise UserError(f"--seq-lens {text}: {part!r} is not a number of tokens; {remedy}") from None
        if min(numbers) < 1:
            raise UserError(f"--seq-lens {text}: lengths and steps must be at least 1; {remedy}")
        if len(numbers) == 1:
            lengths.add(numbers[0])
            continue
        if len(numbers) != 3:
            raise UserError(f"--seq-lens {text}: {part!r} is not a range; {remedy}")
        first, last, step = numbers
        if last < first:
            raise UserError(
                f"--seq-lens {text}: the range ends at {last}, before it begins at {first}; {remedy}"
            )
        lengths.update(range(first, last + 1, step))
    return tuple(sorted(lengths))


def make_point(
    spec: SweepSpec, variant: str, seq_len: int, phase: Phase, capacity: int | None = None
) -> Point:
    """The point of a variant at a length. Raises `UserError` for options the variant refuses."""
    is_time = phase is Phase.TIME
    return Point(
        variant=variant,
        seq_len=seq_len,
        phase=phase,
        device=spec.device,
        seed=spec.seed,
        steps=spec.steps if is_time else MIN_STEPS,
        warmup=spec.warmup if is_time else MEMORY_WARMUP,
        workload=variants.get(variant).resolve(spec.options, seq_len),
        capacity_emulated_bytes=capacity,
        alloc_conf=spec.alloc_conf,
    )


def plan(spec: SweepSpec) -> list[Trial]:
    """Every trial, in order: by repeat, then length, with the variants' order turned round each time.

    Turning it round (A B, B A) keeps a slow drift of the machine from favouring one variant. Memory is
    measured once per variant and length, in the first round.
    """
    points = {
        (variant, seq_len): make_point(spec, variant, seq_len, Phase.TIME)
        for variant in spec.variants
        for seq_len in spec.seq_lens
    }
    trials = []
    for repeat in range(spec.repeats):
        for index, seq_len in enumerate(spec.seq_lens):
            order = spec.variants if (repeat + index) % 2 == 0 else spec.variants[::-1]
            times = [points[variant, seq_len] for variant in order]
            trials += [Trial(point, repeat) for point in times]
            if repeat == 0:
                trials += [
                    Trial(point.at_phase(Phase.MEMORY, MIN_STEPS, MEMORY_WARMUP), 0) for point in times
                ]
    return trials


class Listener(Protocol):
    """Is told how a sweep goes: the live display, or plain lines."""

    def on_trial(self, trial: Trial, number: int, of: int) -> None:
        """A trial begins."""

    def on_event(self, event: Event) -> None:
        """See `megafold_bench.launchers.Watcher`."""

    def on_tick(self) -> None:
        """See `megafold_bench.launchers.Watcher`."""

    def on_record(self, record: Record) -> None:
        """A trial is recorded."""


class Runner:
    """Runs trials one at a time into a run folder; a trial that has a record is not run again."""

    def __init__(
        self,
        folder: RunFolder,
        launcher: Launcher,
        listener: Listener,
        timeout_s: float,
        sample_interval_s: float | None = None,
        retry: Callable[[Record], bool] = lambda record: False,
        snapshot: bool = False,
    ) -> None:
        self._folder = folder
        self._launcher = launcher
        self._listener = listener
        self._timeout_s = timeout_s
        self._sample_interval_s = sample_interval_s
        self._retry = retry
        self._snapshot = snapshot
        self._source = jsonable(own_source())
        folder.adopt_pending(finish)
        self._records = {record["trial_id"]: record for record in latest(folder.records)}
        self._retried: set[str] = set()

    @property
    def records(self) -> list[Record]:
        """The latest record of every trial of the folder so far."""
        return list(self._records.values())

    def recorded(self, trial: Trial) -> Record | None:
        """The record of a trial that need not run; None if it has to."""
        record = self._records.get(trial.trial_id)
        if record is not None and trial.trial_id not in self._retried and self._retry(record):
            return None
        return record

    def run(self, trial: Trial, number: int, of: int) -> Record:
        """The trial's record, running it if there is none yet."""
        found = self.recorded(trial)
        if found is not None:
            return found
        previous = self._records.get(trial.trial_id)
        attempt = 1 if previous is None else previous["attempt"] + 1
        self._retried.add(trial.trial_id)
        self._listener.on_trial(trial, number, of)
        request = WorkerRequest(
            trial=trial,
            run_id=self._folder.manifest["run_id"],
            attempt=attempt,
            record_path=self._folder.record_path(trial.trial_id, attempt),
            log_path=self._folder.log_path(trial.trial_id, attempt),
            started_at=utc_now(),
            started_monotonic_s=time.monotonic(),
            sample_interval_s=self._sample_interval_s,
            snapshot=self._wants_snapshot(trial),
            source=self._source,
        )
        launched = self._launcher.run(request, self._timeout_s, self._listener)
        record = self._conclude(request, launched)
        self._folder.append(record)
        remove_with_halves(request.record_path)
        return self._note(record)

    def _wants_snapshot(self, trial: Trial) -> bool:
        """Once for each point, where memory is measured: keeping stacks costs time."""
        if not self._snapshot or trial.point.phase is not Phase.MEMORY:
            return False
        point_id = trial.point.point_id
        return not any(
            record["point_id"] == point_id and "snapshot" in record["outcome"]
            for record in self._records.values()
        )

    def skip(self, trial: Trial, reason: str) -> Record:
        """Record that a trial was not run because shorter ones already failed."""
        found = self.recorded(trial)
        if found is not None:
            return found
        now = time.monotonic()
        path = self._folder.record_path(trial.trial_id, 1)
        previous = self._records.get(trial.trial_id)
        attempt = 1 if previous is None else previous["attempt"] + 1
        self._retried.add(trial.trial_id)
        request = WorkerRequest(trial, self._folder.manifest["run_id"], attempt, path, path, utc_now(), now)
        record = blank_record(request, Verdict(Outcome.SKIPPED_DOMINATED, reason))
        self._folder.append(record)
        return self._note(record)

    def _note(self, record: Record) -> Record:
        self._records[record["trial_id"]] = record
        self._listener.on_record(record)
        return record

    def _conclude(self, request: WorkerRequest, launched: Launched) -> Record:
        """The worker's own record, or one from what the launcher saw. Raises `UserError`."""
        if launched.user_error is not None:
            raise UserError(launched.user_error)
        if launched.io_error is not None:
            raise UserError(
                f"a worker could not write {launched.io_error}: free some space, then continue with --resume"
            )
        ending = launched.ending
        try:
            record: Record = json.loads(request.record_path.read_bytes())
        except FileNotFoundError:
            record = blank_record(request, complete(ending))
            record["wall_s"] = launched.wall_s
            started = launched.steps_done if ending.last_event != "started" else None
            record["outcome"]["failing_rank"] = 0
            record["outcome"]["failing_step"] = started
        outcome = record["outcome"]
        outcome["exit_code"] = ending.exit_code
        outcome["signal"] = signal_name(ending.signal) if ending.signal is not None else None
        if not Outcome(outcome["status"]).is_ok:
            outcome["log_tail"] = ending.log_tail or None
        return finish(record)


def dominated_by(trial: Trial, records: Iterable[Record]) -> str | None:
    """Why a trial need not be run: what shorter lengths of its variant did; None if it must.

    Two shorter lengths without enough memory, in either phase, or one in the same phase that ran into
    the wall limit, speak for all longer ones.
    """
    point = trial.point
    out_of_memory: set[int] = set()
    too_slow: set[int] = set()
    for record in records:
        factors, outcome = record["factors"], Outcome(record["outcome"]["status"])
        seq_len = factors["seq_len_tokens"]
        if factors["variant"] != point.variant or seq_len >= point.seq_len:
            continue
        if outcome.is_memory:
            out_of_memory.add(seq_len)
        elif outcome is Outcome.TIMEOUT and factors["phase"] == point.phase:
            too_slow.add(seq_len)
    if len(out_of_memory) >= DOMINATED_AFTER:
        return "out of memory already at " + " and ".join(str(n) for n in sorted(out_of_memory)[:2])
    if too_slow:
        return f"over the wall limit already at {min(too_slow)}"
    return None


def run_plan(trials: Sequence[Trial], runner: Runner) -> list[Record]:
    """Run a plan. Returns one record per trial, in plan order."""
    return list(iterate_plan(trials, runner))


def iterate_plan(trials: Sequence[Trial], runner: Runner) -> Iterator[Record]:
    """Run a plan trial by trial."""
    done: list[Record] = []
    for number, trial in enumerate(trials, start=1):
        reason = dominated_by(trial, done)
        record = runner.run(trial, number, len(trials)) if reason is None else runner.skip(trial, reason)
        done.append(record)
        yield record
