"""The optimised reference: ops, drop-in modules, patching, sharding, pipeline.

`apply` puts the fused operators into a built model, ours or one of Boltz, Protenix or OpenFold3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimized.patch import apply

__all__ = ["apply"]


def __getattr__(name: str) -> Any:
    """`apply`, loaded when first asked for: importing the package loads neither torch nor triton."""
    if name == "apply":
        from optimized.patch import apply

        return apply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
