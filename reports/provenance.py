"""Where a run was measured, read from records and manifests into a few named facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

# Where each fact stands. The first path that leads to a value wins; the record is asked before the manifest.
_PATHS: dict[str, tuple[str, ...]] = {
    "device": ("device_name", "gpus.name"),
    "vendor": ("gpus.vendor",),
    "driver": ("gpus.driver",),
    "uuid": ("device_uuid", "gpus.uuid"),
    "toolkit": ("cuda", "hip", "software.torch.cuda", "software.torch.hip"),
    "torch": ("torch", "software.torch.version"),
    "triton": ("triton", "software.triton"),
    "python": ("python", "software.python"),
    "version": ("source.version",),
    "commit": ("source.commit",),
    "dirty": ("source.dirty",),
    "host": ("host.name_hash",),
    "cpu": ("cpu.model", "cpu.name"),
    "fixture": ("fixture",),
}
_CPU_PATHS = {
    "device": ("device_name", "cpu.model", "cpu.name"),
    "vendor": (),
    "driver": (),
    "uuid": (),
    "toolkit": (),
}


def _lookup(tree: Any, path: str) -> Any:
    node = tree
    for part in path.split("."):
        if isinstance(node, list) and node:
            node = node[0]
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node


def _first(trees: Iterable[Mapping[str, Any]], paths: tuple[str, ...]) -> str:
    for tree in trees:
        for path in paths:
            value = _lookup(tree, path)
            if isinstance(value, bool | int | float | str) and value != "":
                return str(value)
    return ""


@dataclass(frozen=True)
class Provenance:
    """Facts as text; empty where the records do not say. `fixture` is set for data nobody measured."""

    device: str
    vendor: str
    driver: str
    uuid: str
    toolkit: str
    torch: str
    triton: str
    python: str
    version: str
    commit: str
    dirty: str
    host: str
    cpu: str
    fixture: str

    @classmethod
    def gather(cls, record: Mapping[str, Any], environment: Mapping[str, Any], device: str) -> Provenance:
        """Facts of a record's provenance, with the manifest's environment behind it.

        `device` is the factor (``"cpu"`` or ``"cuda"``): a run on the CPU names no GPU that stood idle.
        """
        paths = {**_PATHS, **_CPU_PATHS} if device == "cpu" else _PATHS
        return cls(**{name: _first((record, environment), where) for name, where in paths.items()})

    @property
    def short_commit(self) -> str:
        """Seven digits of the commit, with a plus sign where the tree was changed."""
        changed = self.dirty.lower() in ("true", "1") and not self.commit.endswith("+")
        return (self.commit[:7] + ("+" if changed else "")) if self.commit else ""

    def caption(self) -> str:
        """GPU, driver, torch, Triton and commit in one line."""
        named = (
            ("", self.device),
            ("driver ", self.driver),
            ("torch ", self.torch),
            ("triton ", self.triton),
            ("commit ", self.short_commit),
        )
        line = " · ".join(prefix + value for prefix, value in named if value) or "no provenance recorded"
        return f"FIXTURE, not measured: {self.fixture} · {line}" if self.fixture else line

    def differences(self, other: Provenance) -> list[tuple[str, str, str]]:
        """Name and both values of every fact that differs."""
        return [
            (field.name, getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
