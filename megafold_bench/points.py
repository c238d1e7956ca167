"""A point: every factor of one measurement, with an identity that follows from its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any

from megafold_bench.records import Factors
from megafold_bench.variants import Scalar


class Phase(StrEnum):
    """What a trial measures. Times and memory are never taken in the same process."""

    TIME = "time"
    MEMORY = "memory"


def canonical_id(value: Any) -> str:
    """The first 16 hex digits of the sha256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Point:
    """One combination of factors. `workload` is what the variant's ``resolve`` returned."""

    variant: str
    seq_len: int
    phase: Phase
    device: str
    seed: int
    steps: int
    warmup: int
    workload: Mapping[str, Scalar] = field(hash=False)
    world_size: int = 1
    world_size_emulated: int | None = None
    capacity_emulated_bytes: int | None = None
    alloc_conf: str | None = None

    def __post_init__(self) -> None:
        """Freeze the workload's factors."""
        object.__setattr__(self, "workload", MappingProxyType(dict(self.workload)))

    @cached_property
    def factors(self) -> Factors:
        """All factors, as they stand in a record."""
        return {
            "variant": self.variant,
            "seq_len_tokens": self.seq_len,
            "phase": self.phase.value,
            "device": self.device,
            "seed": self.seed,
            "steps": self.steps,
            "warmup_steps": self.warmup,
            "world_size": self.world_size,
            "world_size_emulated": self.world_size_emulated,
            "capacity_emulated_bytes": self.capacity_emulated_bytes,
            "alloc_conf": self.alloc_conf,
            "workload": dict(self.workload),
        }

    @cached_property
    def point_id(self) -> str:
        """Identity of the point."""
        return canonical_id(self.factors)

    @cached_property
    def case_id(self) -> str:
        """Identity without the phase and the step counts: joins time and memory trials."""
        aside = ("phase", "steps", "warmup_steps")
        return canonical_id({name: value for name, value in self.factors.items() if name not in aside})

    @cached_property
    def series_id(self) -> str:
        """Identity without the length: points of one series differ in length only."""
        return canonical_id({**self.factors, "seq_len_tokens": None})

    def at_phase(self, phase: Phase, steps: int, warmup: int) -> Point:
        """The same case in another phase."""
        return replace(self, phase=phase, steps=steps, warmup=warmup)

    @classmethod
    def from_factors(cls, factors: Factors) -> Point:
        """The point of a record."""
        return cls(
            variant=factors["variant"],
            seq_len=factors["seq_len_tokens"],
            phase=Phase(factors["phase"]),
            device=factors["device"],
            seed=factors["seed"],
            steps=factors["steps"],
            warmup=factors["warmup_steps"],
            workload=factors["workload"],
            world_size=factors["world_size"],
            world_size_emulated=factors["world_size_emulated"],
            capacity_emulated_bytes=factors["capacity_emulated_bytes"],
            alloc_conf=factors["alloc_conf"],
        )


@dataclass(frozen=True)
class Trial:
    """One attempt at a point, in its own process. Repeats of a point are trials of their own."""

    point: Point
    repeat: int

    @property
    def trial_id(self) -> str:
        """``<point_id>-<repeat>``."""
        return f"{self.point.point_id}-{self.repeat}"

    def __str__(self) -> str:
        return f"{self.point.variant} N={self.point.seq_len} {self.point.phase} #{self.repeat + 1}"
