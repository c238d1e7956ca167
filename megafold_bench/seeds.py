"""What earlier records say of a boundary: which lengths should fit, and what they need.

A seed is one length of one variant with the same workload. It chooses where a search begins and is no
part of its answer, so it may come from another capacity or another card of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megafold_bench import variants
from megafold_bench.errors import UserError
from megafold_bench.growth import Growth, Hint, Knowledge
from megafold_bench.outcomes import Outcome
from megafold_bench.records import Record, latest
from megafold_bench.sweep import SweepSpec


@dataclass(frozen=True)
class Seed:
    """How a length of a variant ended where its allocator could reserve `limit_bytes`.

    `needs_bytes` is the peak it reserved, None for a failure or where it was not measured or was cut off
    by the limit. `overhead_bytes` is what the device held beside the allocator.
    """

    variant: str
    length: int
    fits: bool
    needs_bytes: int | None
    limit_bytes: int | None
    total_bytes: int | None
    overhead_bytes: int


def _seed(record: Record) -> Seed | None:
    """The seed of one record; None where it ended for another cause than memory."""
    outcome = Outcome(record["outcome"]["status"])
    if not (outcome.is_ok or outcome in (Outcome.OOM_DEVICE, Outcome.OOM_DEVICE_LIB)):
        return None
    memory, factors = record["memory"] or {}, record["factors"]
    emulated = factors["capacity_emulated_bytes"]
    total = memory.get("device_total_bytes") or record["provenance"].get("device_total_bytes")
    overhead = record["provenance"].get("capacity_overhead_bytes") or memory.get("non_torch_bytes") or 0
    capacity = total if emulated is None else emulated
    return Seed(
        variant=factors["variant"],
        length=factors["seq_len_tokens"],
        fits=outcome.is_ok,
        needs_bytes=memory.get("reserved_peak_bytes") if outcome is Outcome.OK else None,
        limit_bytes=None if capacity is None else capacity - overhead,
        total_bytes=total,
        overhead_bytes=overhead,
    )


def seeds_from(records: Iterable[Record], spec: SweepSpec) -> tuple[Seed, ...]:
    """Seeds of the records, of any variant, that ran the workload of `spec` on its kind of device."""
    found: dict[Seed, None] = {}
    for record in latest(records):
        factors = record["factors"]
        if factors["device"] != spec.device or factors["variant"] not in variants.names():
            continue
        try:
            workload = variants.get(factors["variant"]).resolve(spec.options, factors["seq_len_tokens"])
        except UserError:  # a length that these options cannot give is no seed
            continue
        seed = _seed(record) if workload == factors["workload"] else None
        if seed is not None:
            found[seed] = None
    return tuple(found)


def knowledge(seeds: Iterable[Seed], variant: str, capacity: int | None) -> Knowledge:
    """What seeds mean for a variant at a capacity (None: the whole device, taken to be the seeds' own).

    Seeds of other variants only tell how memory grows, and only where the variant has none of its own.
    """
    held = list(seeds)
    ours = [seed for seed in held if seed.variant == variant]
    overhead = max((seed.overhead_bytes for seed in held), default=0)
    whole = max((seed.total_bytes for seed in held if seed.total_bytes is not None), default=None)
    capacity = whole if capacity is None else capacity
    if capacity is None:
        return Knowledge()
    limit = capacity - overhead
    hints = []
    for seed in ours:
        fits = seed.fits if seed.needs_bytes is None else seed.needs_bytes <= limit
        # A success in more memory, or a failure in less, says nothing where the need is not known.
        if seed.needs_bytes is not None or (
            seed.limit_bytes is not None
            and (seed.limit_bytes <= limit if fits else seed.limit_bytes >= limit)
        ):
            hints.append(Hint(seed.length, fits, seed.needs_bytes))
    return Knowledge(tuple(hints), limit, None if ours else _growth(held, limit))


def _growth(seeds: Sequence[Seed], limit: int) -> Growth | None:
    """The growth of the variant that was measured at most lengths."""
    needs: dict[str, dict[int, int]] = {}
    for seed in seeds:
        if seed.needs_bytes is not None:
            needs.setdefault(seed.variant, {})[seed.length] = seed.needs_bytes
    most = max(needs.values(), key=len, default={})
    return Growth.through(most, limit)
