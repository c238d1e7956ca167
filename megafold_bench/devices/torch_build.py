"""Which torch is installed and what it was built for, without importing it (which takes seconds)."""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafold_bench.devices.base import Reading, Unavailable


@dataclass(frozen=True)
class TorchBuild:
    """The facts of ``torch/version.py``: `cuda` and `hip` are the versions torch was built with, or None."""

    version: str
    git: str | None
    cuda: str | None
    hip: str | None
    folder: Path

    @property
    def vendor(self) -> str | None:
        """``"nvidia"``, ``"amd"`` or None for a CPU build."""
        if self.hip is not None:
            return "amd"
        return "nvidia" if self.cuda is not None else None


def _assignments(source: str) -> dict[str, str | None]:
    """Module-level ``name = "text"`` or ``None``, annotated or not."""
    found: dict[str, str | None] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            name, value = node.target.id, node.value
        else:
            continue
        if isinstance(value, ast.Constant) and (value.value is None or isinstance(value.value, str)):
            found[name] = value.value
    return found


def package_folder(name: str) -> Path | None:
    """Folder of an installed package, found without importing it; None if it is absent."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def torch_build() -> Reading[TorchBuild]:
    """What torch is installed. Reads ``torch/version.py``; imports nothing."""
    folder = package_folder("torch")
    if folder is None:
        return Unavailable("torch is not installed")
    try:
        facts = _assignments((folder / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        return Unavailable(f"torch/version.py cannot be read: {error}")
    version = facts.get("__version__")
    if version is None:
        return Unavailable("torch/version.py names no version")
    return TorchBuild(version, facts.get("git_version"), facts.get("cuda"), facts.get("hip"), folder)


def initialised_cuda() -> Any:
    """``torch.cuda`` if this process has already initialised it, else None. Never imports or initialises."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return None
    return cuda
