"""The contract between the harness and whatever it measures, and the registry of variants.

A *variant* is a way of running the workload: ``pytorch``, ``inductor``, ``megafold``. The harness
asks it three things: can you run here (`support`), which complete set of factors do these options
mean (`resolve`), and build me the training step (`build`). Packages add variants through the entry
point group ``megafold_bench.variants``; each entry point names an object with the `Variant`
attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from megafold_bench.errors import UserError

ENTRY_POINT_GROUP = "megafold_bench.variants"

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Support:
    """Whether something can be used on this machine; if not, `reason` says why."""

    usable: bool
    reason: str = ""


class Workload(Protocol):
    """A built training session: model, optimiser and input, on one device.

    One training step is ``step(transfer(load()))``. The three calls are timed apart: waiting for
    data, moving it to the device, and the step itself (forward, backward, optimiser).
    """

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was built, JSON-serialisable: n_atoms, msa_depth, parameters, model_flops_per_step…"""

    def load(self) -> Any:
        """The next host batch."""

    def transfer(self, batch: Any) -> Any:
        """The batch on the device (a batch already there is returned as it is)."""

    def step(self, batch: Any) -> Mapping[str, Any]:
        """One optimiser step. Returns detached scalars still on the device; ``"loss"`` is the total."""


@runtime_checkable
class Variant(Protocol):
    """A way of running the workload."""

    name: str
    summary: str

    def support(self, device: str) -> Support:
        """Whether the variant can run on `device` (``"cpu"`` or ``"cuda"``) here, and why not."""

    def resolve(self, options: Mapping[str, Scalar], seq_len: int) -> dict[str, Scalar]:
        """Every factor these options mean at this length, defaults filled in.

        Raises `UserError` for an unknown option or an impossible value.
        """

    def build(self, factors: Mapping[str, Scalar], seq_len: int, seed: int, device: str) -> Workload:
        """Build the training session in this process."""


def _load(entry: EntryPoint) -> Variant:
    variant = entry.load()
    if not isinstance(variant, Variant):
        raise TypeError(f"entry point {entry.value!r} is not a Variant")
    return variant


def names() -> list[str]:
    """Names of the registered variants, in alphabetical order, without importing any."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def get(name: str) -> Variant:
    """The variant registered under `name`.

    Raises `UserError` if there is none.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return _load(entry)
    known = ", ".join(names()) or "none; is the package installed?"
    raise UserError(f"unknown variant {name!r}: choose from {known}")
