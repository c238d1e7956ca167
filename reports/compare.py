"""Two runs side by side: the same points, their ratios with intervals, and what else differed.

A change of step time is called only where the bootstrap interval of the ratio excludes 1, the ratio is
off by at least the threshold, and the point still counts after Holm's correction over all points (see
`reports.significance`). With one process on a side nothing can be known of the variation between runs: such
a change is called "within one run".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from megafold_bench.errors import UserError
from megafold_bench.records import Record
from megafold_bench.statistics import CHANGE_THRESHOLD, Interval, holm, is_change, ratio_of_medians
from reports.boundary import Boundary, boundaries
from reports.cells import Cell, cell_of, cells
from reports.frame import Run, load_run
from reports.significance import NORMAL_95, Sizes, log_sigma, p_value

if TYPE_CHECKING:
    pass

BY = ("run", "variant", "gpu")
SIGNIFICANCE = 0.05
MEMORY_TOLERANCE_BYTES = 2 << 20
MEMORY_TOLERANCE = 0.005

# Never part of what makes two points the same: how often, which repeat, when.
_COUNTS = ("phase", "steps", "warmup_steps", "seed")
_GPU_FACTORS = ("alloc_conf", "capacity_emulated_bytes")


@dataclass(frozen=True)
class Pair:
    """One point on both sides. Ratios are B over A: above 1, B is slower, larger, hungrier.

    `time_change` and `memory_change` are ``"more"``, ``"less"``, ``"same"`` or empty where one side has
    no value; `p_holm` is the corrected p-value of the time ratio.
    """

    name: str
    a: Cell
    b: Cell
    time: Interval | None
    p_holm: float | None
    time_change: str
    memory: float | None
    memory_change: str
    energy: float | None

    @property
    def newly_failing(self) -> bool:
        """Whether the point ran in A and does not in B."""
        return self.a.outcome.is_ok and not self.b.outcome.is_ok


@dataclass(frozen=True)
class Overall:
    """Geometric mean of one series' time ratios over its lengths, points taken as independent."""

    name: str
    ratio: Interval
    n_points: int
    change: str


@dataclass(frozen=True)
class BoundaryPair:
    """The boundary of one series on both sides."""

    name: str
    a: Boundary
    b: Boundary

    @property
    def ratio(self) -> float | None:
        """How much longer B trains, where both ends are known."""
        return self.b.max_ok / self.a.max_ok if self.a.max_ok and self.b.max_ok else None


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common and where they differ."""

    name_a: str
    name_b: str
    by: str
    pairs: tuple[Pair, ...]
    overall: tuple[Overall, ...]
    boundaries: tuple[BoundaryPair, ...]
    differences: tuple[tuple[str, str, str], ...]
    """(what, in A, in B) of every fact and factor that is not the same."""
    unmatched: tuple[str, ...]
    """Points that only one side has, or whose factors do not agree."""
    caption: str
    threshold: float
    fail_above: float | None

    @property
    def changes(self) -> tuple[Pair, ...]:
        """Points whose step time changed."""
        return tuple(pair for pair in self.pairs if pair.time_change in ("more", "less"))

    @property
    def failures(self) -> tuple[str, ...]:
        """Why `failed` is true; empty without `fail_above`."""
        if self.fail_above is None:
            return ()
        limit, reasons = 1 + self.fail_above, []
        for pair in self.pairs:
            if pair.newly_failing:
                reasons.append(f"{pair.name}: {pair.a.outcome.value} became {pair.b.outcome.value}")
            if pair.time is not None and pair.time_change == "more" and pair.time.estimate > limit:
                reasons.append(f"{pair.name}: slower by {100 * (pair.time.estimate - 1):.1f} %")
            if pair.memory is not None and pair.memory_change == "more" and pair.memory > limit:
                reasons.append(f"{pair.name}: memory larger by {100 * (pair.memory - 1):.1f} %")
        reasons += [
            f"{overall.name}, all lengths: slower by {100 * (overall.ratio.estimate - 1):.1f} %"
            for overall in self.overall
            if overall.change == "more" and overall.ratio.estimate > limit
        ]
        return tuple(reasons)

    @property
    def failed(self) -> bool:
        """Whether B is worse than `fail_above` allows: for the exit status."""
        return bool(self.failures)

    def frame(self) -> pd.DataFrame:
        """One row a point: both sides' values and their ratios."""
        return pd.DataFrame([_row(pair) for pair in self.pairs])


def _row(pair: Pair) -> dict[str, Any]:
    a, b, time = pair.a, pair.b, pair.time
    return {
        "point": pair.name, "variant_a": a.variant, "variant_b": b.variant, "seq_len_tokens": a.seq_len,
        "outcome_a": a.outcome.value, "outcome_b": b.outcome.value,
        "step_time_median_a_s": a.time.median if a.time else None,
        "step_time_median_b_s": b.time.median if b.time else None,
        "time_ratio": time.estimate if time else None, "time_ratio_ci95_lo": time.lo if time else None,
        "time_ratio_ci95_hi": time.hi if time else None, "p_holm": pair.p_holm, "time_change": pair.time_change,
        "peak_memory_a_bytes": a.peak_bytes, "peak_memory_b_bytes": b.peak_bytes, "memory_ratio": pair.memory,
        "memory_change": pair.memory_change, "energy_per_step_a_j": a.energy_j, "energy_per_step_b_j": b.energy_j,
        "energy_ratio": pair.energy, "flags_a": ";".join(a.flags), "flags_b": ";".join(b.flags),
    }  # fmt: skip


def _identity(record: Record, by: str) -> dict[str, Any]:
    """The factors that two points must share."""
    left_out = set(_COUNTS)
    if by == "variant":
        left_out.add("variant")
    if by == "gpu":
        left_out |= set(_GPU_FACTORS)
    factors: Mapping[str, Any] = record["factors"]
    same = {name: value for name, value in factors.items() if name not in left_out | {"workload"}}
    return {**same, "tier": record.get("tier"), **(factors.get("workload") or {})}


@dataclass(frozen=True)
class _Group:
    """The records of one point, with what it must share."""

    identity: Mapping[str, Any]
    variant: str
    records: tuple[Record, ...]

    @property
    def seq_len(self) -> int:
        return int(self.identity["seq_len_tokens"])

    def disagreement(self, other: _Group, by: str) -> list[str]:
        """Names of factors that differ. Between variants, one that only one of them has does not count."""
        names = set(self.identity) | set(other.identity)
        if by == "variant":
            names = set(self.identity) & set(other.identity)
        return sorted(n for n in names if self.identity.get(n) != other.identity.get(n))


def _groups(run: Run, by: str) -> list[_Group]:
    held: dict[str, list[Record]] = {}
    for record in run.records:
        key = json.dumps([_identity(record, by), record["factors"]["variant"]], sort_keys=True)
        held.setdefault(key, []).append(record)
    return [
        _Group(_identity(records[0], by), records[0]["factors"]["variant"], tuple(records))
        for records in held.values()
    ]


def _matches(a: Run, b: Run, by: str) -> tuple[list[tuple[str, _Group, _Group]], list[str]]:
    """Named pairs of groups, and sentences on the points that found no partner."""
    ours, theirs = _groups(a, by), _groups(b, by)
    if by == "variant":
        reference = ours[0].variant
        if all(group.variant == reference for group in theirs):
            raise UserError(
                f"--by variant: {b.name} has no variant other than {reference}; leave --by out to compare runs"
            )
        ours = [group for group in ours if group.variant == reference]
        theirs = [group for group in theirs if group.variant != reference]
    several = len({json.dumps(_common(g), sort_keys=True) for g in (*ours, *theirs)}) > 1
    found, alone = [], []
    lonely: dict[tuple[str, str], list[int]] = {}
    for second in theirs:
        near = [
            g
            for g in ours
            if g.seq_len == second.seq_len and (by == "variant" or g.variant == second.variant)
        ]
        first = next((g for g in near if not g.disagreement(second, by)), None)
        label = f"{second.variant} at {second.seq_len}"
        if first is not None:
            extra = f" · {_setting(second)}" if several and _setting(second) else ""
            found.append((f"{second.variant}{extra} {second.seq_len}", first, second))
        elif near:
            names = near[0].disagreement(second, by)
            told = ", ".join(f"{n} {near[0].identity.get(n)} against {second.identity.get(n)}" for n in names)
            alone.append(f"{label}: not comparable, {told}")
        else:
            lonely.setdefault((b.name, second.variant), []).append(second.seq_len)
    partners = {id(first) for _, first, _ in found}
    told_of = {(g.variant, g.seq_len) for g in theirs}
    for group in ours:
        if id(group) not in partners and (group.variant, group.seq_len) not in told_of:
            lonely.setdefault((a.name, group.variant), []).append(group.seq_len)
    alone += [
        f"{variant} at {', '.join(map(str, sorted(set(lengths))))}: only in {name}"
        for (name, variant), lengths in lonely.items()
    ]
    return sorted(found, key=lambda item: item[1].seq_len), alone


def _common(group: _Group) -> dict[str, Any]:
    names = ("world_size", "world_size_emulated", "capacity_emulated_bytes")
    return {name: group.identity.get(name) for name in names}


def _setting(group: _Group) -> str:
    return ", ".join(f"{name}={value}" for name, value in _common(group).items() if value not in (None, 1))


def _direction(ratio: float) -> str:
    return "more" if ratio > 1 else "less"


def _memory_change(a: int | None, b: int | None) -> tuple[float | None, str]:
    if not a or not b:
        return None, ""
    same = abs(b - a) <= max(MEMORY_TOLERANCE_BYTES, MEMORY_TOLERANCE * a)
    return b / a, "same" if same else _direction(b / a)


def _pairs(matches: Sequence[tuple[str, _Group, _Group]], threshold: float) -> list[Pair]:
    sides = [(name, cell_of(a.variant, a.records), cell_of(b.variant, b.records)) for name, a, b in matches]
    ratios = [
        ratio_of_medians(a.time.processes, b.time.processes) if a.time and b.time else None
        for _, a, b in sides
    ]
    p_values = {
        i: p_value(ratio, Sizes.of(a.time, b.time))
        for i, ((_, a, b), ratio) in enumerate(zip(sides, ratios, strict=True))
        if ratio is not None and a.time and b.time
    }
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    pairs = []
    for i, ((name, a, b), ratio) in enumerate(zip(sides, ratios, strict=True)):
        change = ""
        if ratio is not None:
            called = is_change(ratio, threshold) and corrected[i] < SIGNIFICANCE
            change = _direction(ratio.estimate) if called else "same"
        memory, memory_change = _memory_change(a.peak_bytes, b.peak_bytes)
        if not a.on_device and memory_change and memory is not None and abs(memory - 1) < threshold:
            memory_change = "same"  # resident memory is never twice the same to half a per cent
        energy = b.energy_j / a.energy_j if a.energy_j and b.energy_j else None
        pairs.append(Pair(name, a, b, ratio, corrected.get(i), change, memory, memory_change, energy))
    return pairs


def _overall(pairs: Iterable[Pair], threshold: float) -> list[Overall]:
    by_name: dict[str, list[tuple[Interval, float]]] = {}
    for pair in pairs:
        if pair.time is not None and pair.a.time and pair.b.time:
            sigma = log_sigma(pair.time, Sizes.of(pair.a.time, pair.b.time))
            by_name.setdefault(pair.name.rsplit(" ", 1)[0], []).append((pair.time, sigma))
    result = []
    for name, ratios in by_name.items():
        mean = sum(math.log(ratio.estimate) for ratio, _ in ratios) / len(ratios)
        half = NORMAL_95 * math.sqrt(sum(sigma * sigma for _, sigma in ratios)) / len(ratios)
        low, high = (0.0, math.inf) if math.isinf(half) else (math.exp(mean - half), math.exp(mean + half))
        ratio = Interval(math.exp(mean), low, high, any(r.within_run for r, _ in ratios))
        change = _direction(ratio.estimate) if is_change(ratio, threshold) else "same"
        result.append(Overall(name, ratio, len(ratios), change))
    return result


def _factor_differences(matches: Sequence[tuple[str, _Group, _Group]]) -> list[tuple[str, str, str]]:
    """Factors and facts that differ although the points were compared, once each."""
    found: dict[tuple[str, str, str], None] = {}
    for _, a, b in matches:
        first, second = a.records[0], b.records[0]
        left = {**first["factors"], **(first["factors"].get("workload") or {}), **(first.get("facts") or {})}
        right = {
            **second["factors"],
            **(second["factors"].get("workload") or {}),
            **(second.get("facts") or {}),
        }
        for name in sorted((set(left) | set(right)) - {"workload", "phase"}):
            if isinstance(left.get(name), dict | list) or left.get(name) == right.get(name):
                continue
            found[(name, str(left.get(name, "–")), str(right.get(name, "–")))] = None
    return list(found)


def _boundary_pairs(a: Run, b: Run, by: str) -> list[BoundaryPair]:
    ours, theirs = boundaries(cells(a.records)), boundaries(cells(b.records))
    ours = [x for x in ours if x.max_ok is not None or x.min_fail is not None]
    theirs = [x for x in theirs if x.max_ok is not None or x.min_fail is not None]
    if by == "variant":
        return [BoundaryPair(x.series, ours[0], x) for x in theirs if ours and x.series != ours[0].series]
    named = {x.series: x for x in ours}
    return [BoundaryPair(x.series, named[x.series], x) for x in theirs if x.series in named]


def compare(
    run_a: Path,
    run_b: Path,
    by: str = "run",
    fail_above: float | None = None,
    threshold: float = CHANGE_THRESHOLD,
) -> Comparison:
    """Compare the points that `run_a` (the reference) and `run_b` share.

    `by` says what is meant to differ: ``"run"`` nothing but time and place, ``"gpu"`` the device, and
    ``"variant"`` the variant: the first of A against each other one of B (both may be one folder). All
    other factors must agree; what does not is listed. `fail_above` and `threshold` are fractions.
    Raises `UserError` if nothing can be compared.
    """
    if by not in BY:
        raise UserError(f"--by {by}: choose from {', '.join(BY)}")
    a, b = load_run(run_a), load_run(run_b)
    for run in (a, b):
        if not run.records:
            raise UserError(f"{run.path} has no record yet: nothing to compare")
    matches, unmatched = _matches(a, b, by)
    if not matches:
        raise UserError(f"{a.name} and {b.name} share no point to compare by {by}: {unmatched[0]}")
    # A threshold to fail at that is finer than the usual one asks for finer changes to be called.
    threshold = threshold if fail_above is None else min(threshold, fail_above)
    pairs = _pairs(matches, threshold)
    provenance_a, provenance_b = a.provenance, b.provenance
    return Comparison(
        name_a=a.name, name_b=b.name, by=by, pairs=tuple(pairs), overall=tuple(_overall(pairs, threshold)),
        boundaries=tuple(_boundary_pairs(a, b, by)),
        differences=(*provenance_a.differences(provenance_b), *_factor_differences(matches)),
        unmatched=tuple(unmatched), caption=f"A: {provenance_a.caption()}. B: {provenance_b.caption()}",
        threshold=threshold, fail_above=fail_above,
    )  # fmt: skip
